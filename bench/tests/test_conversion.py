"""The table of what a conversion takes."""

import json
import os

from bench.conversion import DOCS, Watch, rate, table
from bench.marks import replaced


def test_speed_counts_what_is_read_and_what_is_written():
    plain = {"seconds": 2.0, "written": 4_000_000_000}
    slow = {"seconds": 6.0, "written": 8_000_000_000, "own_memory": 330_000_000}
    assert rate(4_000_000_000, plain) == 4.0
    text = table(
        {
            "source": 4_000_000_000,
            "largest": 117_440_512,
            "idle": 300_000_000,
            "runs": {"plain copy": plain, "to bfloat16": slow},
        }
    )
    assert "| plain copy | 2.0 | 4.0 GB | 4.00 | 100% | - |" in text
    assert "| to bfloat16 | 6.0 | 8.0 GB | 2.00 | 50% | 0.03 GB |" in text


def test_the_watch_sees_what_a_process_holds():
    held = b"x" * (64 << 20)
    watch = Watch(os.getpid())
    watch._ended.wait(0.1)
    assert watch.stop() > len(held)


def test_the_page_shows_its_data():
    found = json.loads((DOCS / "assets" / "conversion.json").read_text(encoding="utf-8"))
    page = (DOCS / "how-to" / "load-released-weights.md").read_text(encoding="utf-8")
    assert replaced(page, table(found)) == page
