"""How a model is to be trained (arXiv 2412.19437, 3.2), beside the model and the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ds_train.errors import TrainError
from ds_train.parallel.schedules import Name
from ds_train.plan.cluster import Precision

Recomputed = Literal["none", "parts", "block"]


class PlanError(TrainError, ValueError):
    """A recipe that can't be; names field, value and what would be right."""


@dataclass(frozen=True)
class Recipe:
    """Attributes are those of `[parallel]` and `[train]` where they have the same names.

    Attributes:
        devices: of the cluster: pp x ep x dp.
        batch: sequences of a step, over all devices.
        sequence: tokens of one.
        pp: pipeline ranks.
        ep: ranks that share a layer's experts.
        zero: 1 deals master weights and moments out to who holds the same weights.
        schedule: of the pipeline.
        micro_batch: sequences that go through the pipeline at once.
        precision: of the products.
        recompute: what the backward pass makes again: "none"; "parts": norms, SwiGLU and MLA's
            up-projections (arXiv 2412.19437, section 3.2.3); "block": all of a block.
        chunks: pieces of the model a pipeline rank has in turn under an interleaved 1F1B (arXiv
            2104.04473), which others have and we do not.
    """

    devices: int
    batch: int
    sequence: int
    pp: int = 1
    ep: int = 1
    zero: int = 1
    schedule: Name = "1f1b"
    micro_batch: int = 1
    precision: Precision = "bfloat16"
    recompute: Recomputed = "none"
    chunks: int = 1

    def __post_init__(self) -> None:
        whole = ("devices", "batch", "sequence", "pp", "ep", "micro_batch", "chunks")
        for name in whole:
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        known = {
            "schedule": get_args(Name),
            "precision": get_args(Precision),
            "recompute": get_args(Recomputed),
            "zero": (0, 1),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                said = ", ".join(map(str, values))
                raise PlanError(f"{name} is {getattr(self, name)!r}; it must be one of {said}")
        if self.devices % (self.pp * self.ep):
            raise PlanError(
                f"devices is {self.devices}; it must be a multiple of pp x ep = {self.pp} x "
                f"{self.ep}"
            )
        share = self.micro_batch * self.ep * self.dp
        if self.batch % share:
            raise PlanError(
                f"batch is {self.batch}; it must be a multiple of micro_batch x ep x dp = "
                f"{self.micro_batch} x {self.ep} x {self.dp} = {share}"
            )
        if self.chunks > 1 and self.schedule != "1f1b":
            raise PlanError(f"chunks is {self.chunks} under {self.schedule}; only 1f1b has them")

    @property
    def dp(self) -> int:
        """Replicas of pipelines and experts."""
        return self.devices // (self.pp * self.ep)

    @property
    def micro_batches(self) -> int:
        """Of each pipeline."""
        return self.batch // (self.micro_batch * self.ep * self.dp)

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.micro_batch * self.sequence

    @property
    def two_ways(self) -> bool:
        """Whether a forward and a backward pass overlap each other's exchange."""
        return self.schedule.startswith("dualpipe")
