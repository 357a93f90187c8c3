"""Stop strings against a search that sees one character after the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_serve.stopping import StopStrings


def cut_by_search(text, stops):
    """What precedes the first stop string to be complete; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


letters = st.text(alphabet="ab", max_size=12)


@given(
    pieces=st.lists(letters, max_size=6),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_any_cutting_gives_the_same_text(pieces, stops):
    matcher = StopStrings(tuple(stops))
    shown = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    assert (shown, matcher.hit) == cut_by_search("".join(pieces), stops)


@given(
    pieces=st.lists(letters, max_size=6),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_no_more_is_held_back_than_may_become_a_stop(pieces, stops):
    matcher = StopStrings(tuple(stops))
    shown = arrived = ""
    for piece in pieces:
        shown += matcher.feed(piece)
        arrived += piece
        if matcher.hit:
            return
        held = arrived[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one E", "N", "D two"], ["one ", "", ""]),
        (["one EN", "T"], ["one ", "ENT"]),
        (["END"], [""]),
    ],
)
def test_across_borders_of_pieces(pieces, expected):
    matcher = StopStrings(("END",))
    assert [matcher.feed(piece) for piece in pieces] == expected
