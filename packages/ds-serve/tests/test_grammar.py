"""Answers of a given form, against parsers of that form."""

import json
import re

import numpy as np
import pytest

from conftest import PROMPT, as_document, tokens_of
from ds_serve.engine import Grammar, GrammarError, Grammars, Rules

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(model, tokenizer):
    return Grammars(tokenizer, model.config.vocab_size, {tokenizer.eos_token_id})


def said(writer, tokenizer, matcher, **rules):
    ends = frozenset({tokenizer.eos_token_id})
    prompt = as_document(tokenizer, PROMPT)
    text, updates = writer.begin(prompt, Rules(80, ends=ends, **rules), matcher=matcher)
    writer.engine.submit([text])
    tokens_of(updates)
    assert text.finish_reason == "stop"
    return tokenizer.decode(text.tokens[len(prompt) :])


@pytest.mark.parametrize("seed", range(6))
def test_json_fits_its_schema(writer, tokenizer, grammars, seed):
    matcher = grammars.matcher(Grammar.of("json_schema", SCHEMA))
    found = json.loads(said(writer, tokenizer, matcher, temperature=1.0, seed=seed))
    assert set(found) == {"name", "age", "tags"}
    assert len(found["name"]) <= 8
    assert found["age"] in range(100)
    assert set(found["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("pattern", ["[a-c]{3,5}x", r"(yes|no), \d{2}", "é+!"])
def test_text_fits_its_pattern(writer, tokenizer, grammars, pattern):
    for seed in range(3):
        matcher = grammars.matcher(Grammar("regex", pattern))
        rules = {"temperature": 1.0, "seed": seed, "logit_bias": {}}
        assert re.fullmatch(pattern, said(writer, tokenizer, matcher, **rules))


def test_one_of_some_texts_and_a_grammar(writer, tokenizer, grammars):
    choice = grammars.matcher(Grammar.of("choice", ["union", "un", "café"]))
    assert said(writer, tokenizer, choice) in {"union", "un", "café"}
    lark = 'start: "a" b+ "c"\nb: "x" | "y"'
    found = said(
        writer, tokenizer, grammars.matcher(Grammar("lark", lark)), temperature=1.0, seed=1
    )
    assert re.fullmatch("a[xy]+c", found)


def test_tokens_beyond_the_tokenizers_are_shut_out(tokenizer):
    wider = Grammars(tokenizer, tokenizer.vocab_size + 70, {tokenizer.eos_token_id})
    mask = wider.matcher(Grammar("regex", "[a-z]+")).allowed()
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert bits[: tokenizer.vocab_size].any()
    assert not bits[tokenizer.vocab_size :].any()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar("regex", "("), "regex"),
        (Grammar.of("json_schema", {"type": "nonsense"}), "nonsense"),
        (Grammar("lark", "start: missing"), "missing"),
        (Grammar("json_schema", "{"), ""),
    ],
    ids=str,
)
def test_what_is_no_form_is_refused_in_one_line(grammars, grammar, words):
    with pytest.raises(GrammarError) as error:
        grammars.matcher(grammar)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
