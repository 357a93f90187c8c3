"""How a field of a request is read: supported, ignored, or refused.

A field is ignored only if it changes no answer: a client that asks for `audio` must not think that
it gets some. Of a refused field values that ask for nothing pass (null, or the default that OpenAI
documents).
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

# Fields of OpenAI's that change no answer here.
IGNORED = {
    "metadata": "kept by OpenAI with stored answers; nothing is stored here",
    "parallel_tool_calls": "a model calls as many tools at once as it likes",
    "prompt_cache_key": "prefixes are found by their content",
    "prompt_cache_retention": "blocks are kept as long as there is room",
    "safety_identifier": "names the client's user",
    "service_tier": "there is one",
    "store": "nothing is stored",
    "user": "names the client's user",
}
# Fields that we do not have: the values that ask for nothing, and why they are refused.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "text only"),
    "best_of": ((1,), "ask for `n` answers and choose"),
    "dimensions": ((), "an embedding has the model's width"),
    "function_call": (("none", "auto"), "the older name of `tool_choice`"),
    "functions": (([],), "the older name of `tools`"),
    "modalities": ((["text"],), "text only"),
    "moderation": ((), "there is no moderation model"),
    "prediction": ((), "drafts come from the MTP module"),
    "prompt_cache_options": ((), "prefixes are found by their content"),
    "suffix": ((), "the model was not trained to fill gaps"),
    "verbosity": (("medium",), "say it in the prompt"),
    "web_search_options": ((), "there is no search"),
}


def _asks_nothing(key: str, value: object) -> bool:
    if key in IGNORED:
        return True
    # In Python 0 == False, but `echo: 0` asks for something.
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
        for nothing in REFUSED.get(key, ((),))[0]
    )


def one_or_list(value: object) -> object:
    """Make a list of one text."""
    return [value] if isinstance(value, str) else value


def prompts(value: object) -> object:
    """Make a list of prompts of one: a text, or its token ids."""
    if isinstance(value, str) or _are_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a text, a list of token ids, or a list of either")
    if not (all(isinstance(item, str) for item in value) or all(map(_are_ids, value))):
        raise ValueError("give a text, a list of token ids, or a list of either")
    return value


def _are_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


def by_token(value: object) -> object:
    """Make numbers of the keys of `logit_bias`, which JSON has as text."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token): bias for token, bias in value.items()}
    except (TypeError, ValueError) as error:
        raise ValueError("keys must be token ids") from error


def joined_parts(value: object) -> object:
    """Join OpenAI's list of content parts; only text is understood."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case _:
                raise ValueError('parts of a message must be {"type": "text", "text": "..."}')
    return "".join(texts)


class Strict(BaseModel):
    """No unknown fields, no `"5"` for 5; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)
    # What clients add to the answers that they got, and send back with them.
    of_the_client: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_nothing(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {
            key: value
            for key, value in body.items()
            if value is not None
            and key not in cls.of_the_client
            and (key in cls.model_fields or not _asks_nothing(key, value))
        }
