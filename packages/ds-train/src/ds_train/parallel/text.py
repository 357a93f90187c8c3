"""A schedule as lines of text: a row a rank, a column a unit of time."""

from __future__ import annotations

from math import gcd

from ds_train.parallel.schedules import Costs, Schedule, Slot, Timetable

_LETTERS = "abcdefghij"
_FINEST = 4  # columns of one unit, at most


def timetable_text(schedule: Schedule, timetable: Timetable, costs: Costs) -> str:
    """Return one line a rank.

    A forward pass is its micro-batch's last digit, a backward one a letter (a for 0), its half for
    the weights a `w`, an overlapped pair alternates; a dot is idle.

    Args:
        schedule: what is done.
        timetable: when.
        costs: what the timetable was made with.
    """
    scale = _columns_of_a_unit(costs)
    width = round(timetable.length * scale)
    lines = []
    for rank, slots in enumerate(schedule.ranks):
        row = ["."] * width
        times = zip(slots, timetable.starts[rank], timetable.ends[rank], strict=True)
        for slot, start, end in times:
            first, last = round(start * scale), round(end * scale)
            row[first:last] = _cells(slot, last - first)
        lines.append(f"{rank:>3} {''.join(row)}")
    return "\n".join(lines)


def _columns_of_a_unit(costs: Costs) -> int:
    """Return the fewest columns in which all durations are whole, if they are few."""
    lengths = [costs.forward, costs.backward, costs.weights, costs.overlapped]
    for columns in range(1, _FINEST + 1):
        if all(abs(length * columns - round(length * columns)) < 1e-9 for length in lengths):
            common = gcd(*(round(length * columns) for length in lengths))
            return max(1, columns // common)
    return _FINEST


def _cells(slot: Slot, count: int) -> list[str]:
    signs = []
    for work in slot:
        digit = work.micro_batch % 10
        letter = "w" if work.kind == "W" else _LETTERS[digit]
        signs.append(str(digit) if work.kind == "F" else letter)
    return [signs[i % len(signs)] for i in range(count)]
