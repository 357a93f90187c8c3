"""Questions with feedback: clickable where a kernel runs, folded answers where none does."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import ipywidgets as widgets


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        text: What is asked.
        options: What can be answered.
        answer: Index of the right one.
        why: For each option what to tell who chose it.

    Raises:
        ValueError: The answer is not an option, or an option has no feedback of its own.
    """

    text: str
    options: tuple[str, ...]
    answer: int
    why: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that everything fits."""
        if not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"answer is {self.answer}; it must be an index of the {len(self.options)} options"
            )
        if len(self.why) != len(self.options) or not all(self.why):
            raise ValueError(
                f"why has {len(self.why)} texts for {len(self.options)} options; each needs its own"
            )
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"two options of {self.text!r} are the same")


@dataclass(frozen=True)
class Answer:
    """What a chosen option earns.

    Attributes:
        right: Whether it is the one.
        feedback: Why, or why not.
    """

    right: bool
    feedback: str


class Quiz:
    """A few questions; at the end of a cell it shows itself.

    Args:
        *questions: In order.
    """

    def __init__(self, *questions: Question) -> None:
        self.questions = questions

    def answer(self, question: int, option: int) -> Answer:
        """Return what option `option` of question `question` earns, both counted from 0.

        Raises:
            IndexError: There is no such question or option.
        """
        asked = self.questions[question]
        if not 0 <= option < len(asked.options):
            raise IndexError(f"option {option} of {len(asked.options)}")
        return Answer(option == asked.answer, asked.why[option])

    def _widget(self) -> widgets.Widget:
        return widgets.VBox([self._asked(i) for i in range(len(self.questions))])

    def _asked(self, index: int) -> widgets.Widget:
        asked = self.questions[index]
        choice = widgets.RadioButtons(
            options=[(text, i) for i, text in enumerate(asked.options)],
            value=None,
            layout=widgets.Layout(width="auto"),
            description_allow_html=False,
        )
        feedback = widgets.HTML()

        def chosen(change: dict[str, Any]) -> None:
            if change["new"] is not None:
                found = self.answer(index, change["new"])
                word = "Right." if found.right else "Not quite."
                feedback.value = f"<b>{word}</b> {escape(found.feedback)}"

        choice.observe(chosen, names="value")
        title = widgets.HTML(f"<b>{index + 1}. {escape(asked.text)}</b>")
        return widgets.VBox([title, choice, feedback], layout=widgets.Layout(margin="0 0 1em 0"))

    def as_html(self) -> str:
        """Return questions with folded answers, for pages without a kernel."""
        parts = []
        for number, asked in enumerate(self.questions, 1):
            options = "".join(f"<li>{escape(text)}</li>" for text in asked.options)
            reasons = "".join(
                f"<li>{'<b>Right.</b> ' if i == asked.answer else ''}{escape(text)}</li>"
                for i, text in enumerate(asked.why)
            )
            parts.append(
                f"<p><b>{number}. {escape(asked.text)}</b></p>"
                f'<ol type="a">{options}</ol>'
                f'<details><summary>Answer</summary><ol type="a">{reasons}</ol></details>'
            )
        return f'<div class="quiz">{"".join(parts)}</div>'

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        # A live front end takes the widget, a static page the HTML.
        shown = dict(self._widget()._repr_mimebundle_())
        return {**shown, "text/html": self.as_html(), "text/plain": "a quiz"}
