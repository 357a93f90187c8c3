"""Templates render as in `transformers`, in a sandbox."""

import re

import pytest

from ds_model.chat_template import DEEPSEEK_CHAT_TEMPLATE, render
from ds_model.errors import TokenizerError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "And 2 < 1?"},
]
TOKENS = {"bos_token": "<b>", "eos_token": "<e>"}


def test_deepseek_conversation_as_released():
    """The layout in the released V3's README: text of the system, then marked turns."""
    text = render(DEEPSEEK_CHAT_TEMPLATE, TALK, add_generation_prompt=True, **TOKENS)
    assert text == (
        "<b>Be brief.<｜User｜>1 < 2?<｜Assistant｜>Yes.<e><｜User｜>And 2 < 1?<｜Assistant｜>"
    )
    closed = render(DEEPSEEK_CHAT_TEMPLATE, TALK, add_generation_prompt=False, **TOKENS)
    assert text == closed + "<｜Assistant｜>"


def test_blocks_are_trimmed():
    """`trim_blocks` and `lstrip_blocks`: a line that holds only a tag leaves nothing."""
    template = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}"
    )
    assert render(template, [{"content": "a"}, {"content": "b"}]) == "a\nb\n"


def test_tojson_keeps_letters_and_angle_brackets():
    value = {"é": "<b>&'", "a": [1]}
    assert render("{{ value | tojson }}", [], value=value) == '{"é": "<b>&\'", "a": [1]}'
    indented = render("{{ value | tojson(indent=1) }}", [], value={"a": 1})
    assert indented == '{\n "a": 1\n}'


def test_loop_controls_generation_tag_and_date():
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('-%Y-') }}"
    )
    assert re.fullmatch(r"a-\d{4}-", render(template, [{"content": "a"}, {"content": "b"}]))


def test_a_template_may_refuse():
    with pytest.raises(TokenizerError, match="only users may speak"):
        render("{{ raise_exception('only users may speak') }}", TALK)
    with pytest.raises(TokenizerError, match="unknown role tool"):
        render(DEEPSEEK_CHAT_TEMPLATE, [{"role": "tool", "content": ""}], **TOKENS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ ''.join(1) }}",
    ],
    ids=["syntax", "escape", "mutation", "endless", "type", "argument"],
)
def test_a_broken_or_hostile_template_is_one_line(template):
    with pytest.raises(TokenizerError) as caught:
        render(template, TALK)
    assert "\n" not in str(caught.value)
