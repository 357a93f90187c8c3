"""Some of a model's layers, for machines that share it (arXiv 2412.19437, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe import ExpertRanks


@dataclass(frozen=True)
class ModelPart:
    """Which layers of a model have their weights here; the others' are elsewhere.

    Attributes:
        blocks: the blocks' numbers in the whole model, ascending.
        embedding: whether the embedding is here. Whoever has the end needs it as well if there are
            MTP modules, or if the head is tied to it.
        end: whether the last norm, the head and the MTP modules are.
        expert_ranks: who shares the routed experts, if they do not all lie here.

    Raises:
        ValueError: the blocks are not in order.
    """

    blocks: tuple[int, ...]
    embedding: bool = True
    end: bool = True
    expert_ranks: ExpertRanks | None = None

    def __post_init__(self) -> None:
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks are {self.blocks}; they must be different and in order")
