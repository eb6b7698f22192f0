"""Benchmarks: installed as dfs_engine.benchmarks, run by `dfs bench`."""
