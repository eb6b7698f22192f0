"""In a checkout, `kernels/`, `benchmarks/` and `configs/` lie beside the package; setup.py maps them into it.

Imported first, so that a checkout works without being installed.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
if (_ROOT / "pyproject.toml").is_file():
    sys.modules["dfs_engine"].__path__.append(str(_ROOT))
