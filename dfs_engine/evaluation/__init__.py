"""Measuring a multi-exit model."""

from dfs_engine.evaluation.metrics import ExitMetrics, table

__all__ = ["ExitMetrics", "table"]
