"""The form that an answer must have, from whichever field asks for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ds_serve.api.parts import CALL, CALL_END, CALLS, CALLS_END, SEPARATOR
from ds_serve.api.requests import ChatRequest, NamedTool, SamplingRequest, Tool
from ds_serve.engine import COMPACT, Grammar

if TYPE_CHECKING:
    from ds_model import Tokenizer

_ANY_OBJECT = {"type": "object"}


def form_of(request: SamplingRequest) -> Grammar | None:
    """Return what `structured_outputs` asks for; `None` if any text will do."""
    form = request.structured_outputs
    if form is None:
        return None
    if form.json_schema is not None:
        return Grammar.of("json_schema", form.json_schema)
    if form.regex is not None:
        return Grammar("regex", form.regex)
    if form.choice is not None:
        return Grammar.of("choice", form.choice)
    return Grammar("lark", form.grammar or "")


def form_of_chat(request: ChatRequest, tokenizer: Tokenizer) -> Grammar | None:
    """Do as `form_of`, and heed `response_format` and a tool that must be called.

    The request has been checked: at most one of them asks for something.
    """
    called = _must_call(request)
    if called:
        return _one_call(called, tokenizer)
    wanted = request.response_format
    if wanted is not None and wanted.type != "text":
        schema = wanted.json_schema.schema_ if wanted.json_schema else _ANY_OBJECT
        return Grammar.of("json_schema", schema)
    return form_of(request)


def _must_call(request: ChatRequest) -> Sequence[Tool]:
    """Return the tools of which one must be called; none if none must."""
    choice = request.tool_choice
    if isinstance(choice, NamedTool):
        return [tool for tool in request.tools if tool.function.name == choice.function.name]
    return request.tools if choice == "required" else []


def _one_call(tools: Sequence[Tool], tokenizer: Tokenizer) -> Grammar:
    """Return the grammar of one call of one of these tools, in V3.1's layout."""

    def mark(name: str) -> str:
        token = tokenizer.token_to_id(name)
        return json.dumps(name) if token is None else f"<[{token}]>"

    calls = []
    for i, tool in enumerate(tools):
        schema = {**(tool.function.parameters or _ANY_OBJECT), "x-guidance": COMPACT}
        calls.append(
            f"call_{i}: {mark(CALL)} {json.dumps(tool.function.name)} {mark(SEPARATOR)} "
            f"%json {json.dumps(schema)} {mark(CALL_END)}"
        )
    one = " | ".join(f"call_{i}" for i in range(len(tools)))
    whole = f"start: {mark(CALLS)} ({one}) {mark(CALLS_END)}"
    return Grammar("lark", "\n".join([whole, *calls]))
