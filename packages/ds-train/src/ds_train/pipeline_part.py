"""What a pipeline rank has of a model, and what it holds from moment to moment.

Whose activations: arXiv 2412.19437, section 3.2.1 and table 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Half = Literal["B", "I", "W"]  # a backward pass, or one of its halves; see `Schedule`


class Holding(NamedTuple):
    """Whose activations a pipeline rank holds at one moment, in micro-batches.

    Attributes:
        doing: kind of the backward work that is done, if it is one.
        at: whose work: which of the rank's stages, in the order of the model.
        kept: for each stage of the rank, in the order of the model: those between their forward
            and their backward pass, the one at work included.
        waiting: the same between the backward pass' two halves.
    """

    doing: Half | None
    at: int
    kept: tuple[int, ...]
    waiting: tuple[int, ...]


@dataclass(frozen=True)
class PipelinePart:
    """What a pipeline rank has.

    Attributes:
        stages: the numbers of the blocks of each of its stages, in the order of the model.
        embedding: whether it has the embedding.
        end: whether its last stage has what follows the last block.
        holdings: what it holds at each moment; one micro-batch's backward pass by default.
        rows: micro-batches whose states travel in one exchange, at most.
        ep: ranks that share the experts.
        zero: ranks that hold the same experts and share their moments, as `ep` times as many share
            those of all else (ZeRO-1); 0 if none are shared.
    """

    stages: tuple[tuple[int, ...], ...]
    embedding: bool = True
    end: bool = True
    holdings: tuple[Holding, ...] = (Holding("B", 0, (1,), (0,)),)
    rows: int = 0
    ep: int = 1
    zero: int = 0
