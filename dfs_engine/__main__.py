"""`python -m dfs_engine` is `dfs`."""

import sys


def main() -> int:
    """Runs the command; a plain install, which lacks its packages, is told so in one line."""
    from dfs_engine.runtime.extras import needs

    try:
        with needs("train"):
            from dfs_engine import cli
    except ModuleNotFoundError as error:
        print(f"dfs: error: {error}", file=sys.stderr)
        return 2
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
