"""Stop strings in text that arrives in pieces."""

from __future__ import annotations


class StopStrings:
    """Passes text on until a stop string is complete, whatever the pieces it arrives in.

    The stop string that is complete first wins, and of those that end at the same place the
    longest: that rule gives the same text for every way to cut the input. What may be the
    beginning of a stop string is held back until it is clear.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Take the next piece and return what may be shown of all that came so far."""
        if self.hit:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.hit = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of the text begin the stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
