"""`python -m dfs_engine` is `dfs`."""

import sys

from dfs_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
