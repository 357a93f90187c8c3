"""The suite against `torch` and `transformers`, and the writer of the reference files.

The cases live with the tests of ds-model, which must run without this folder; importing
`parity` makes them importable.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before either engine is imported: no download is ever tried, and TensorFlow keeps quiet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

sys.path.insert(0, str(Path(__file__).parents[1] / "packages/ds-model/tests"))
