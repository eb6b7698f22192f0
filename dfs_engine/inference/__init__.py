"""Inference that stops early: each sample leaves at the first exit that is sure enough of it."""

from dfs_engine.inference.early_exit import EarlyExit
from dfs_engine.inference.policies import Entropy, MaxProbability, Patience, Policy
from dfs_engine.inference.prediction import Prediction
from dfs_engine.inference.prepare import prepare
from dfs_engine.inference.simulate import simulate
from dfs_engine.inference.thresholds import OperatingPoint, find_thresholds

__all__ = [
    "EarlyExit",
    "Entropy",
    "MaxProbability",
    "OperatingPoint",
    "Patience",
    "Policy",
    "Prediction",
    "find_thresholds",
    "prepare",
    "simulate",
]
