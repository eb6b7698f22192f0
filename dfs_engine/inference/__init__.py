"""Inference that stops early, each sample at the first exit that is sure enough of it; and what that is worth."""

from dfs_engine.inference.budgeted import BudgetedPoint, budgeted_batch
from dfs_engine.inference.early_exit import EarlyExit
from dfs_engine.inference.export import export_model
from dfs_engine.inference.exported import ExportedModel
from dfs_engine.inference.per_sample import Outputs, load_per_sample
from dfs_engine.inference.policies import Entropy, MaxProbability, Patience, Policy
from dfs_engine.inference.prediction import Prediction
from dfs_engine.inference.prepare import prepare
from dfs_engine.inference.simulate import simulate
from dfs_engine.inference.thresholds import OperatingPoint, find_thresholds

__all__ = [
    "BudgetedPoint",
    "EarlyExit",
    "Entropy",
    "ExportedModel",
    "MaxProbability",
    "OperatingPoint",
    "Outputs",
    "Patience",
    "Policy",
    "Prediction",
    "budgeted_batch",
    "export_model",
    "find_thresholds",
    "load_per_sample",
    "prepare",
    "simulate",
]
