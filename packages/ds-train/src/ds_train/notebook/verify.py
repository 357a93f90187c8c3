"""Are the questions and exercises of a notebook themselves right?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_train.notebook.exercise import Exercise
from ds_train.notebook.quiz import Quiz


def verify(namespace: Mapping[str, Any]) -> list[str]:
    """Try every quiz and exercise among a notebook's names.

    Args:
        namespace: Most often `globals()`, at the notebook's end.

    Returns:
        What is wrong, one line each: an option that earns the wrong word, a solution that fails, a
        mistake that passes, an exercise without a known mistake.
    """
    return [line for name, value in list(namespace.items()) for line in _problems(name, value)]


def _problems(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Quiz):
        for number, asked in enumerate(value.questions):
            right = [i for i in range(len(asked.options)) if value.answer(number, i).right]
            if right != [asked.answer]:
                yield f"{name}: question {number + 1} takes options {right} for right"
    elif isinstance(value, Exercise):
        found = value.check(value.solution)
        if found.status != "right":
            yield f"{name}: its solution fails: {found.hint or found.status}"
        if not value.mistakes:
            yield f"{name}: has no mistake that its check must see through"
        for mistake, function in value.mistakes.items():
            if value.check(function).status != "wrong":
                yield f"{name}: the mistake {mistake!r} passes"
