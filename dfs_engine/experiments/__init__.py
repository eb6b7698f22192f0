"""Lists of runs under one recipe, with their tables and pictures: `dfs compare`, `dfs sweep`."""
