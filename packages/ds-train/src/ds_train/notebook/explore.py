"""A figure with controls: they move it where a kernel runs; elsewhere it shows its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as widgets
from IPython.display import display


@dataclass(frozen=True)
class Choice:
    """What a control offers, and where it stands at first.

    Attributes:
        options: In order.
        default: One of them.

    Raises:
        ValueError: The default is not an option.
    """

    options: Sequence[Any]
    default: Any

    def __post_init__(self) -> None:
        """Check the default."""
        if self.default not in self.options:
            raise ValueError(f"default is {self.default!r}; it must be one of {self.options!r}")


def explore(draw: Callable[..., Any], **controls: Sequence[Any] | Choice) -> None:
    """Show what `draw` returns, and controls that draw it again.

    Args:
        draw: Takes each control's value by its name; returns a figure or anything else that
            shows itself.
        **controls: What each offers; a plain sequence stands at its first.
    """
    offered = {
        name: each if isinstance(each, Choice) else Choice(tuple(each), next(iter(each)))
        for name, each in controls.items()
    }
    sliders = {
        name: widgets.SelectionSlider(
            options=list(each.options),
            value=each.default,
            description=name.replace("_", " "),
            style={"description_width": "initial"},
            continuous_update=False,
        )
        for name, each in offered.items()
    }
    display(widgets.HBox(list(sliders.values()), layout=widgets.Layout(flex_flow="row wrap")))
    shown = display(draw(**{name: each.default for name, each in offered.items()}), display_id=True)

    def redraw(_: Any) -> None:
        shown.update(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
