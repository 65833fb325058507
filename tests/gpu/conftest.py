"""Whole runs are those of `tests/contracts`, the cases of kernels those of `tests/kernels`."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("contracts", "kernels")]
