"""Answers of a given form: a JSON schema, a regular expression, a grammar, or one of some texts.

llguidance (https://github.com/guidance-ai/llguidance) says before each token which may follow; the
others' logits are shut out. It knows tokens that straddle the parts of a grammar, and takes tens of
microseconds a token.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from ds_serve.engine.text import words_for

if TYPE_CHECKING:
    from ds_model import Tokenizer


# Blank space between the parts of JSON is fixed: a model could else write it without end.
COMPACT = {"whitespace_flexible": False}


class GrammarError(ValueError):
    """No answer can be made to this form; the message says why."""


@dataclass(frozen=True)
class Grammar:
    """A form.

    Attributes:
        kind: what `source` is: a JSON schema, a regular expression (Rust's, without look-around),
            a grammar in Lark's notation, or a JSON list of texts.
        source: as text.
    """

    kind: Literal["json_schema", "regex", "lark", "choice"]
    source: str

    @classmethod
    def of(cls, kind: Literal["json_schema", "choice"], value: Any) -> Grammar:
        """Return a form that is given as JSON."""
        return cls(kind, json.dumps(value))

    def compiled(self) -> str:
        """Return it in llguidance's own form.

        Raises:
            GrammarError: it is not what it says.
        """
        try:
            match self.kind:
                case "json_schema":
                    return LLMatcher.grammar_from_json_schema(self.source, overrides=COMPACT)
                case "regex":
                    return LLMatcher.grammar_from_regex(self.source)
                case "lark":
                    return LLMatcher.grammar_from_lark(self.source)
                case "choice":
                    texts = " | ".join(json.dumps(text) for text in json.loads(self.source))
                    return LLMatcher.grammar_from_lark(f"start: {texts}")
        except ValueError as error:
            raise GrammarError(_one_line(str(error))) from error


class Matcher:
    """Where one answer stands in its form.

    Args:
        matcher: llguidance's.
        words: of 32 bits that a mask has.
    """

    def __init__(self, matcher: LLMatcher, words: int) -> None:
        self._matcher, self._words = matcher, words

    @property
    def done(self) -> bool:
        """Whether the answer is complete, and nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> np.ndarray:
        """Return a bit for each token that may come next, `[W]` int32."""
        found = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        mask = np.zeros(self._words, np.int32)
        mask[: len(found)] = found[: self._words]
        return mask

    def take(self, token: int) -> None:
        """Go on by a token.

        Raises:
            GrammarError: it does not fit.
        """
        if not self._matcher.consume_token(token):
            raise GrammarError(_one_line(self._matcher.get_error()))


class Grammars:
    """Makes matchers for one tokenizer.

    Args:
        tokenizer: of the model.
        vocabulary: tokens of the model, some of which the tokenizer may not have.
        ends: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, ends: Collection[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, sorted(ends)
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """Return a matcher at the beginning of an answer; takes milliseconds and more.

        Raises:
            GrammarError: the grammar is wrong, or too large.
        """
        with self._lock:  # made once
            known = self._known
        found = LLMatcher(known, grammar.compiled(), log_level=0)
        if found.is_error():
            raise GrammarError(_one_line(found.get_error()))
        return Matcher(found, words_for(self._vocabulary))

    @cached_property
    def _known(self) -> LLTokenizer:
        ends = self._ends or None
        return LLTokenizer(self._tokenizer.to_json(), n_vocab=self._vocabulary, eos_token=ends)


def _one_line(text: str, most: int = 300) -> str:
    words = " ".join(text.split())
    return words if len(words) <= most else words[: most - 3] + "..."
