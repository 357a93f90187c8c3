"""Chat templates as `transformers` renders them, from a checkpoint that is not trusted.

A template is Jinja source from `tokenizer_config.json`. It runs in Jinja's immutable sandbox:
no attribute that reaches the interpreter, nothing changed, loops of bounded length.
"""

# ruff: noqa: RUF001 - the released token names are spelt with U+FF5C, not with a pipe

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ds_model.errors import TokenizerError

Message = Mapping[str, Any]

DEEPSEEK_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
"""How DeepSeek-V3 lays out a plain conversation: system text first, turns marked by role."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: marks assistant text; here it just renders."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads this name on the class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The conversation as text.

    Args:
        template: Jinja source.
        messages: `{"role": ..., "content": ...}` in order.
        **variables: what else the template may name, such as `bos_token`, `tools`,
            `add_generation_prompt`.

    Raises:
        TokenizerError: the template is broken, or refuses the messages.
    """
    try:
        return _compile(template).render(messages=messages, **variables)
    except (TemplateError, TypeError, ValueError, OverflowError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TokenizerError(f"the chat template does not take these messages: {reason}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)
