"""Inference that stops early: each sample leaves at the first exit that is sure enough of it."""

from dfs_engine.inference.early_exit import EarlyExit
from dfs_engine.inference.export import export_model
from dfs_engine.inference.exported import ExportedModel
from dfs_engine.inference.policies import Entropy, MaxProbability, Patience, Policy
from dfs_engine.inference.prediction import Prediction
from dfs_engine.inference.simulate import simulate
from dfs_engine.inference.thresholds import OperatingPoint, find_thresholds

__all__ = [
    "EarlyExit",
    "Entropy",
    "ExportedModel",
    "MaxProbability",
    "OperatingPoint",
    "Patience",
    "Policy",
    "Prediction",
    "export_model",
    "find_thresholds",
    "simulate",
]
