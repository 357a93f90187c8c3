"""Something to write yourself, a check that answers, and a worked solution to compare with."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from IPython.display import HTML, Markdown, display


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        status: "right", "wrong", or "unwritten" while the skeleton still stands.
        hint: What to look at; empty where it is right.
    """

    status: Literal["right", "wrong", "unwritten"]
    hint: str = ""

    def _repr_html_(self) -> str:
        said = {
            "right": "<b>Right.</b>",
            "wrong": f"<b>Not yet.</b> {escape(self.hint)}",
            "unwritten": "<b>Not written yet.</b> Replace <code>raise NotImplementedError</code>.",
        }
        return f'<p class="checked">{said[self.status]}</p>'


class Exercise:
    """A task; at the end of a cell it shows itself.

    Args:
        task: Markdown: what to write.
        check: Is given what the learner wrote; raises `AssertionError` with a hint where it is
            wrong. Any other error of the learner's code counts as wrong too.
        solution: The worked answer.
        mistakes: Answers that go wrong in a way people do, by what is wrong with them; the check
            must see through each.
    """

    def __init__(
        self,
        task: str,
        check: Callable[[Any], None],
        solution: Callable[..., Any],
        mistakes: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.task = task
        self.solution = solution
        self.mistakes = dict(mistakes)
        self._check = check

    def check(self, candidate: Any) -> Checked:
        """Say whether `candidate` is right, and if not, what to look at; raises nothing."""
        try:
            self._check(candidate)
        except NotImplementedError:
            return Checked("unwritten")
        except AssertionError as error:
            return Checked("wrong", str(error).strip() or "a check failed")
        except Exception as error:  # noqa: BLE001 - whatever the learner's code does
            return Checked("wrong", f"{type(error).__name__}: {error}")
        return Checked("right")

    def show_solution(self) -> None:
        """Show the worked answer's source, folded."""
        code = textwrap.dedent(inspect.getsource(self.solution))
        display(
            HTML(
                "<details><summary>A worked solution</summary>"
                f"<pre><code>{escape(code)}</code></pre></details>"
            )
        )

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/markdown": Markdown(self.task).data, "text/plain": self.task}
