"""Write what was found: the data, the plots, the page."""

from __future__ import annotations

from pathlib import Path

from bench.cost import limit_speed
from bench.found import Found
from bench.growth_plots import write_plots
from bench.process import ROOT
from bench.report import page, read_notes
from bench.tasks import PRESET, Precision, Task
from ds_model import ModelConfig

NOTES = ROOT / "bench" / "notes.md"

GROWN: tuple[Precision, ...] = ("float32", "bfloat16", "int8")  # whose limits the plots show


def publish(found: Found, out: Path) -> None:
    """Write benchmarks.md and assets/benchmarks* under a folder, and print the page."""
    keep(found, out)
    assets = out / "assets"
    config = ModelConfig.preset(PRESET)
    good = [point for point in found.growth if "failed" not in point]
    write_plots(good, decode_limits(found, config), assets)
    text = page(found, config, read_notes(NOTES))
    (out / "benchmarks.md").write_text(text, encoding="utf-8")
    print(text)


def keep(found: Found, out: Path) -> None:
    """Write the data alone, from which `--render` makes the page; nothing measured is lost."""
    assets = out / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    data = found.model_dump_json(indent=1) + "\n"
    (assets / "benchmarks.json").write_text(data, encoding="utf-8")


def decode_limits(found: Found, config: ModelConfig) -> dict[int, dict[str, float]]:
    """Return the tokens a second that the limits allow, by batch and precision."""
    limits: dict[int, dict[str, float]] = {}
    for point in found.growth:
        if point["group"] != "batch":
            continue
        for precision in GROWN:
            task = Task("decode", point["x"], point["context"], precision, new=point["new"])
            limit = limit_speed(config, task, found.limits)
            if limit is not None:
                limits.setdefault(point["x"], {})[precision] = limit
    return limits
