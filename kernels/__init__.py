"""Triton kernels of dfs_engine, installed as `dfs_engine.kernels`. They know pointers and ranges, not autograd."""
