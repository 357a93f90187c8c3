"""What a step holds in memory, as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ds_train.memory import TrainingMemory

MIB = 2**20


def show_memory(found: TrainingMemory, measured: int | None, title: str) -> None:
    """Print what one process holds, and beside it what was measured."""
    table = Table("what", "MiB", title=title)
    table.columns[1].justify = "right"
    for name, size in found.rows():
        table.add_row(name, f"{size / MIB:,.1f}")
    console = Console()
    console.print(table)
    if measured is not None:
        said = found.step + found.scratch
        console.print(
            f"Beside parameters and moments {said / MIB:,.1f} MiB; measured "
            f"{measured / MIB:,.1f} ({measured / said - 1:+.0%}).",
            highlight=False,
        )


def show_ranks(found: Sequence[TrainingMemory], title: str) -> None:
    """Print what pipeline ranks hold, side by side."""
    table = Table("MiB", *(f"pipeline {rank}" for rank in range(len(found))), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [dict(rank.rows()[:-1]) for rank in found]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(f"{row.get(name, 0) / MIB:,.1f}" for row in rows))
    table.add_row("peak", *(f"{rank.peak / MIB:,.1f}" for rank in found))
    table.add_row("at", *(rank.peak_at for rank in found))
    Console().print(table)
