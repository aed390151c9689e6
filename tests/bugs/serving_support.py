"""Lets the tests of this folder use the bundles and servers of tests/serve."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
