"""Taking apart what a chat model writes, in whatever pieces it comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_serve.api.parts import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR, Parts, thinks

V31 = f'{CALL}weather{SEPARATOR}{{"city": "Paris"}}{CALL_END}'
V3 = f'{CALL}function{SEPARATOR}time\n```json\n{{"zone": "UTC"}}\n```{CALL_END}'

# A text, how it is read, and the parts: thoughts, words, and calls by name and arguments.
CASES = {
    "words": ("Hello <there>", {}, ("", "Hello <there>", [])),
    "R1": ("<think>\nHm.\n</think>\n\nYes.", {}, ("Hm.\n", "Yes.", [])),
    "R1 whose prompt opens the thought": (
        "Hm.</think>Yes.",
        {"thinking": True},
        ("Hm.", "Yes.", []),
    ),
    "a thought that does not end": ("<think>Hm", {}, ("Hm", "", [])),
    "no reasoning model": ("<think>Hm", {"reasons": False}, ("", "<think>Hm", [])),
    "thinking later is said": ("So <think>x</think>", {}, ("", "So <think>x</think>", [])),
    "V3.1 call": (
        f"Let me see. {CALLS}{V31}{CALLS_END}",
        {"tools": True},
        ("", "Let me see.", [("weather", '{"city": "Paris"}')]),
    ),
    "V3 calls": (
        f"{CALLS}{V3}\n{V3}{CALLS_END}",
        {"tools": True},
        ("", "", [("time", '{"zone": "UTC"}')] * 2),
    ),
    "thought, then call": (
        f"<think>Hm.</think>{CALLS}{V31}{V3}{CALLS_END} Done.",
        {"tools": True},
        ("Hm.", "Done.", [("weather", '{"city": "Paris"}'), ("time", '{"zone": "UTC"}')]),
    ),
    "a call that does not end is none": (f"Oh {CALLS}{V31[:-5]}", {"tools": True}, ("", "Oh", [])),
    "marks without tools are words": (f"x{CALLS}", {}, ("", f"x{CALLS}", [])),
    "a mark that never comes": ("a <｜tool", {"tools": True}, ("", "a <｜tool", [])),
}


def read(pieces, **how):
    parts = Parts(**how)
    found = [part for piece in pieces for part in parts.feed(piece)] + parts.finish()
    said = {"reasoning": "", "content": ""}
    for part in found:
        if part.kind != "call":
            said[part.kind] += part.text
    calls = [part for part in found if part.kind == "call"]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.key for call in calls}) == len(calls)
    return said["reasoning"], said["content"], [(call.name, call.text) for call in calls]


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_whole_text(case):
    text, how, expected = CASES[case]
    assert read([text], **how) == expected


@given(st.sampled_from(sorted(CASES)), st.data())
def test_pieces_make_no_difference(case, data):
    text, how, expected = CASES[case]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    reasoning, content, calls = read(pieces, **how)
    # Where a piece ends before a call's mark, blank space before it may be out already.
    assert (reasoning, content.rstrip(), calls) == (expected[0], expected[1].rstrip(), expected[2])


def test_text_is_shown_as_soon_as_it_is_no_mark():
    parts = Parts(tools=True)
    assert [p.text for p in parts.feed("Hello")] == ["Hello"]
    assert [p.text for p in parts.feed(" <｜to")] == [" "]
    assert [p.text for p in parts.feed("ast")] == ["<｜toast"]


def test_a_prompt_that_lets_the_model_think():
    assert thinks("<｜Assistant｜><think>\n")
    assert not thinks("<｜Assistant｜>")
