"""A model beside the three yardsticks, on the same held-out bytes, in the same run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ds_model import CausalLM, Tokenizer
from ds_train.data import Document
from ds_train.evaluation.bits_per_byte import bits_per_byte
from ds_train.evaluation.yardsticks import (
    ngram_bits_per_byte,
    unigram_bits_per_byte,
    xz_bits_per_byte,
)


@dataclass(frozen=True)
class Report:
    """Bits per byte of held-out documents; less is better.

    Attributes:
        model: The trained model.
        unigram: Byte frequencies of the training text.
        xz: `xz -9` with the training text before it.
        ngram: Back-off 5-gram over bytes of the training text.
        documents: How many were held out.
        bytes: Their size.
        tokens: What the model scored.
        context: Tokens of a window; each further window scores half of it.
    """

    model: float
    unigram: float
    xz: float
    ngram: float
    documents: int
    bytes: int
    tokens: int
    context: int

    @property
    def beats_all(self) -> bool:
        """Whether the model needs fewer bits than each yardstick."""
        return self.model < min(self.unigram, self.xz, self.ngram)

    def rows(self) -> list[tuple[str, float]]:
        """Return names and bits per byte, worst first."""
        named = {
            "byte unigrams": self.unigram,
            "back-off 5-gram over bytes": self.ngram,
            "xz -9": self.xz,
            "this model": self.model,
        }
        return sorted(named.items(), key=lambda row: -row[1])

    def save(self, path: Path, **more: Any) -> None:
        """Write it as JSON, with what else is to be known about it."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self) | more, indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path, **more: Any) -> Self | None:
        """Read what `save` wrote; None if it is not there or was saved with other `more`."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if any(values.pop(key, None) != value for key, value in more.items()):
                return None
            return cls(**values)
        except (OSError, ValueError, TypeError):
            return None


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    training: Sequence[Document],
    held_out: Sequence[Document],
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure a model and the yardsticks on held-out documents.

    Args:
        model: Trained on `training`.
        tokenizer: Trained on `training` too.
        training: What the yardsticks learn from.
        held_out: What all are measured on.
        context: Tokens of the model's window.
        progress: Called with windows done and in all, while the model works.
    """
    found = bits_per_byte(model, tokenizer, held_out, context, progress=progress)
    old = [d.text.encode() for d in training]
    new = [d.text.encode() for d in held_out]
    return Report(
        model=found.bits_per_byte,
        unigram=unigram_bits_per_byte(old, new),
        xz=xz_bits_per_byte(old, new),
        ngram=ngram_bits_per_byte(old, new),
        documents=len(held_out),
        bytes=found.bytes,
        tokens=found.tokens,
        context=context,
    )
