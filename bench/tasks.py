"""What is timed: every task, and the token streams that all systems are given."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

Kind = Literal["train", "prefill", "decode"]
Precision = Literal["float32", "bfloat16", "int8", "int8_channel", "int4", "fp8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRESET = "bench"
CONTEXT = 512
AGREEMENT_ROWS = 8
GREEDY_TOKENS = 32


@dataclass(frozen=True)
class Task:
    """One row of the benchmark.

    Attributes:
        kind: "train" is a whole optimizer step; "prefill" reads prompts and gives the logits of
            their last positions; "decode" writes tokens one by one after a prompt.
        batch: sequences at once.
        length: tokens of each sequence; for "decode" those of the prompt.
        precision: of the products; "bfloat16" training keeps float32 weights; what follows it
            are small weights, beside activations of the system's choice.
        new: tokens that "decode" writes for each sequence, the first apart.
        long: timed with `--full` only.
    """

    kind: Kind
    batch: int
    length: int
    precision: Precision
    new: int = 0
    long: bool = False

    @property
    def key(self) -> str:
        """A name without spaces, for files and notes."""
        return f"{self.kind}-{self.batch}x{self.length}-{self.precision}"

    @property
    def title(self) -> str:
        """The name that the page shows."""
        precision = {"float32": "float32", "bfloat16": "BF16", "int8": "8-bit weights"}
        shown = precision.get(self.precision, f"{self.precision} weights")
        what = {
            "train": f"train step, {self.batch} x {self.length}",
            "prefill": f"prefill, {self.batch} x {self.length}",
            "decode": f"decode, batch {self.batch}, {self.length} before",
        }
        mixed = " mixed" if (self.kind, self.precision) == ("train", "bfloat16") else ""
        return f"{what[self.kind]}, {shown}{mixed}"

    @property
    def tokens(self) -> int:
        """Tokens that one run works through."""
        return self.batch * (self.new if self.kind == "decode" else self.length)

    def ids(self, vocab_size: int) -> np.ndarray:
        """Return `[batch, length]` int32, the same for every system; one column more to train.

        Training rows overlap by a token, as rows that are cut from one text do: a row's last token
        is only predicted, and is the next row's first.
        """
        if self.kind != "train":
            return stream(vocab_size, self.batch, self.length)
        starts = np.arange(self.batch)[:, None] * self.length
        return self.text(vocab_size)[starts + np.arange(self.length + 1)]

    def text(self, vocab_size: int) -> np.ndarray:
        """Return the `[batch * length + 1]` int32 tokens that training rows are cut from."""
        return stream(vocab_size, 1, self.batch * self.length + 1)[0]

    def to_json(self) -> dict[str, Any]:
        """Return the fields, as a worker gets them."""
        return asdict(self)


def stream(vocab_size: int, rows: int, columns: int) -> np.ndarray:
    """Return `[rows, columns]` int32 random tokens, the same on each call.

    The first two are left out: they begin and end a text, and some systems act on them.
    """
    random = np.random.default_rng(rows * 1_000_003 + columns)
    return random.integers(2, vocab_size, (rows, columns), dtype=np.int32)


TASKS: tuple[Task, ...] = (
    Task("train", 8, 256, "float32"),
    Task("prefill", 1, CONTEXT, "float32"),
    Task("prefill", 8, CONTEXT, "float32"),
    Task("decode", 1, CONTEXT, "float32", new=64),
    Task("decode", 8, CONTEXT, "float32", new=32),
    Task("decode", 32, CONTEXT, "float32", new=32, long=True),
    Task("train", 8, 256, "bfloat16"),
    Task("prefill", 1, CONTEXT, "bfloat16"),
    Task("prefill", 8, CONTEXT, "bfloat16"),
    Task("decode", 1, CONTEXT, "bfloat16", new=64),
    Task("decode", 8, CONTEXT, "bfloat16", new=32),
    Task("decode", 32, CONTEXT, "bfloat16", new=32, long=True),
    Task("decode", 1, CONTEXT, "int8", new=64, long=True),
)
