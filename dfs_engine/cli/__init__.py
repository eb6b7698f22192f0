"""The command `dfs`."""

from dfs_engine.cli.commands import main

__all__ = ["main"]
