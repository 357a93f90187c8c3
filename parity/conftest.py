"""Where the suite finds the cases, and how it keeps both engines quiet."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The cases live with the tests of ds-model, which must run without this folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "packages/ds-model/tests"))
