r"""What a chat model writes, taken apart: what it thinks, what it says, which tools it calls.

DeepSeek's models mark all three in their text: `<think>` ... `</think>` around what R1 thinks
(arXiv 2501.12948), and tokens of their own around calls, in one of two layouts:

    V3, R1:  CALL function SEPARATOR NAME \n ```json \n ARGUMENTS \n ``` CALL_END
    V3.1:    CALL NAME SEPARATOR ARGUMENTS CALL_END

all calls between `CALLS` and `CALLS_END`; the constants below have the marks' names.
"""

# ruff: noqa: RUF001 - the released token names are spelt with U+FF5C and U+2581

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from uuid import uuid4

from ds_serve.stopping import overlap

THINK, THOUGHT = "<think>", "</think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FENCED = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: "reasoning", "content", or "call".
        text: of the first two; the arguments of a call.
        name: the tool that is called.
        key: of the call.
        index: of the call, from 0.
    """

    kind: Literal["reasoning", "content", "call"]
    text: str
    name: str = ""
    key: str = ""
    index: int = 0


class Parts:
    """Takes text in pieces and gives parts, whatever the pieces it comes in.

    A call is given when it is whole.

    Args:
        thinking: the text begins inside of what the model thinks.
        reasons: `<think>` at its beginning opens that.
        tools: marks of calls are read.
    """

    def __init__(self, thinking: bool = False, reasons: bool = True, tools: bool = False) -> None:
        self._held = ""
        self._tools = tools
        self._state: Literal["start", "thinking", "saying", "calls"] = "start"
        if thinking:
            self._state = "thinking"
        elif not reasons:
            self._state = "saying"
        # Blank space at the beginning of what follows a mark is dropped.
        self._fresh = self._state == "thinking"
        self.calls = 0

    def feed(self, text: str) -> list[Part]:
        """Take the next piece, and return what is certain now."""
        self._held += text
        found: list[Part] = []
        while self._turn(found):
            pass
        return found

    def finish(self) -> list[Part]:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        if self._state == "calls" or not held:
            return []  # an unfinished call is no call
        return self._part("reasoning" if self._state == "thinking" else "content", held)

    def _turn(self, found: list[Part]) -> bool:
        """Move on by one mark; say whether more may follow."""
        match self._state:
            case "start":
                stripped = self._held.lstrip()
                if not stripped or (THINK.startswith(stripped) and stripped != THINK):
                    return False
                if stripped.startswith(THINK):
                    self._held, self._state = stripped.removeprefix(THINK), "thinking"
                    self._fresh = True
                else:
                    self._state = "saying"
                return True
            case "thinking":
                return self._until(THOUGHT, "reasoning", "saying", found)
            case "saying":
                if self._tools:
                    return self._until(CALLS, "content", "calls", found)
                found += self._part("content", self._held)
                self._held = ""
                return False
            case "calls":
                return self._call(found)

    def _until(
        self,
        mark: str,
        kind: Literal["reasoning", "content"],
        then: Literal["saying", "calls"],
        found: list[Part],
    ) -> bool:
        before, hit, after = self._held.partition(mark)
        if hit:
            found += self._part(kind, before.rstrip() if then == "calls" else before)
            self._held, self._state, self._fresh = after, then, True
            return True
        shown = len(self._held) - overlap(self._held, mark)
        found += self._part(kind, self._held[:shown])
        self._held = self._held[shown:]
        return False

    def _part(self, kind: Literal["reasoning", "content"], text: str) -> list[Part]:
        if self._fresh:
            text = text.lstrip()
        if not text:
            return []
        self._fresh = False
        return [Part(kind, text)]

    def _call(self, found: list[Part]) -> bool:
        begin, end = self._held.find(CALL), self._held.find(CALL_END)
        if CALLS_END in self._held and begin < 0:
            self._held = self._held.partition(CALLS_END)[2]
            self._state, self._fresh = "saying", True
            return True
        if begin < 0 or end < 0:
            return False
        body = self._held[begin + len(CALL) : end]
        self._held = self._held[end + len(CALL_END) :]
        name, _, arguments = body.partition(SEPARATOR)
        if name.strip() == "function" and (fenced := arguments.partition("\n"))[1]:
            name, arguments = fenced[0], fenced[2]
        if whole := _FENCED.fullmatch(arguments):
            arguments = whole[1]
        key = f"call_{uuid4().hex[:24]}"
        found.append(Part("call", arguments.strip(), name.strip(), key, self.calls))
        self.calls += 1
        return True


def thinks(prompt: str) -> bool:
    """Say whether a prompt ends where the model is to think."""
    return prompt.rstrip().endswith(THINK)
