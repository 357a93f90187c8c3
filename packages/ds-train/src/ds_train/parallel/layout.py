"""Which part of the model lies where: blocks by stage, experts by share, and who holds the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, islice

from ds_model import ModelConfig, ModelPart, parameters_by_part
from ds_moe import ExpertRanks
from ds_train.errors import TrainConfigError
from ds_train.parallel.mesh import Group, Mesh
from ds_train.parallel.schedules import Schedule
from ds_train.pipeline_part import PipelinePart

_EXPERTS = re.compile(r"/mlp/(gate_up_proj|down_proj)$")
_BLOCK = re.compile(r"block_(\d+)/")
_STAGES_COUNT = 0.01  # beside ranks


def blocks_of_stages(
    config: ModelConfig, stages: int, together: Sequence[Sequence[int]] | None = None
) -> list[tuple[int, ...]]:
    """Deal blocks out to stages, in order, so that the ranks have as even work as can be.

    Work is counted in parameters that multiply a token; the last stage has the head and the MTP
    modules besides, each of which goes through the head again.

    Args:
        config: of the model.
        stages: how many.
        together: the stages that one rank holds; each its own if `None`.

    Returns:
        The blocks of each stage.

    Raises:
        TrainConfigError: there are more stages than blocks.
    """
    layers = config.num_hidden_layers
    if stages > layers:
        raise TrainConfigError(
            f"{stages} pipeline stages and num_hidden_layers = {layers}; each stage needs a block"
        )
    ranks = together or [(stage,) for stage in range(stages)]
    works, end = work_of_blocks(config)
    share, more = divmod(layers, stages)
    sizes = [share + (stage < more) for stage in range(stages)]

    def loads(sizes: list[int]) -> list[int]:
        ends = accumulate(sizes)
        found = [sum(works[last - size : last]) for size, last in zip(sizes, ends, strict=True)]
        found[-1] += end
        return found

    def of_ranks(stages: list[int]) -> list[int]:
        return [sum(stages[stage] for stage in rank) for rank in ranks]

    def unevenness(sizes: list[int]) -> float:
        stages = loads(sizes)
        # Ranks count, and where those are even, stages: activations lie where blocks do.
        return sum(n**2 for n in of_ranks(stages)) + _STAGES_COUNT * sum(n**2 for n in stages)

    # Take from the busiest what another can do with less harm, as long as that helps.
    while True:
        now = loads(sizes)
        busiest = of_ranks(now)
        givers = {*ranks[busiest.index(max(busiest))], now.index(max(now))}
        moves = [
            [size - (stage == giver) + (stage == taker) for stage, size in enumerate(sizes)]
            for giver in givers
            for taker in range(stages)
            if sizes[giver] > 1 and taker != giver
        ]
        best = min(moves, key=unevenness, default=sizes)
        if unevenness(best) >= unevenness(sizes):
            break
        sizes = best
    numbers = iter(range(layers))
    return [tuple(islice(numbers, size)) for size in sizes]


@cache
def work_of_blocks(config: ModelConfig) -> tuple[tuple[int, ...], int]:
    """Return the parameters that multiply a token in each block, and those behind the last one."""
    parts = parameters_by_part(config)
    chosen, experts = config.num_experts_per_tok or 0, config.n_routed_experts or 1
    active = {name: part.shared + part.experts * chosen // experts for name, part in parts.items()}
    head = active.get("lm_head", active["embed_tokens"])
    depth = config.num_nextn_predict_layers
    end = head + sum(active[f"mtp.{k}"] + head for k in range(depth))
    return tuple(active[f"blocks.{i}"] for i in range(config.num_hidden_layers)), end


@dataclass(frozen=True)
class Layout:
    """A model on a mesh under a schedule.

    Attributes:
        config: of the model.
        mesh: of ranks.
        schedule: of the pipeline; also says which stages each of its ranks holds.
    """

    config: ModelConfig
    mesh: Mesh
    schedule: Schedule

    def __post_init__(self) -> None:
        experts = self.config.n_routed_experts or 0
        if self.mesh.ep > 1 and (not experts or experts % self.mesh.ep):
            raise TrainConfigError(
                f"[parallel] ep = {self.mesh.ep} and n_routed_experts = {experts}; each rank needs "
                "the same number of experts"
            )
        self.blocks  # noqa: B018 - whose numbers may not fit

    @cached_property
    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of each stage."""
        return blocks_of_stages(self.config, self.schedule.stages, self.schedule.together)

    @property
    def last_stage(self) -> int:
        """The stage with the head."""
        return self.schedule.stages - 1

    def part(self, pp: int, expert_ranks: ExpertRanks | None = None) -> ModelPart:
        """Return what a pipeline rank holds.

        Args:
            pp: which one.
            expert_ranks: who shares its experts.
        """
        stages = self.schedule.held_by(pp)
        blocks = sorted(block for stage in stages for block in self.blocks[stage])
        return ModelPart(
            tuple(blocks),
            embedding=pp in self._holders_of_embedding(),
            end=self.last_stage in stages,
            expert_ranks=expert_ranks,
        )

    def memory_part(self, pp: int, zero: bool = False) -> PipelinePart:
        """Return what `training_memory` needs to know of a pipeline rank.

        Args:
            pp: which one.
            zero: whether replicas share moments.
        """
        schedule, part = self.schedule, self.part(pp)
        ways = len(self._ranks_of(0))
        return PipelinePart(
            tuple(self.blocks[stage] for stage in schedule.held_by(pp)),
            part.embedding,
            part.end,
            tuple(dict.fromkeys(schedule.holdings(pp))),
            schedule.exchange_rows(pp),
            self.mesh.ep,
            self.mesh.dp * ways if zero else 0,
        )

    def holders(self, name: str) -> tuple[int, ...]:
        """Return the pipeline ranks that hold a weight.

        Args:
            name: its path below the model, as in `block_3/mlp/gate/weight`.
        """
        if name.startswith("embed_tokens/"):
            return self._holders_of_embedding()
        block = _BLOCK.match(name)
        if block is None:
            return self._ranks_of(self.last_stage)
        at = int(block[1])
        return self._ranks_of(next(s for s, blocks in enumerate(self.blocks) if at in blocks))

    def replicas(self, name: str, rank: int) -> Group:
        """Return the ranks that hold the same numbers of a weight as this one."""
        return self.mesh.replicas(self.holders(name), rank, is_expert(name))

    def _holders_of_embedding(self) -> tuple[int, ...]:
        first, last = self._ranks_of(0), self._ranks_of(self.last_stage)
        both = self.config.tie_word_embeddings or self.config.num_nextn_predict_layers
        return tuple(sorted({*first, *last})) if both else first

    def _ranks_of(self, stage: int) -> tuple[int, ...]:
        ways = (0, 1) if self.schedule.name == "dualpipe" else (0,)
        return tuple(sorted({self.schedule.rank_of(stage, way) for way in ways}))


def is_expert(name: str) -> bool:
    """Say whether a weight, by its path below the model, is a stack of routed experts."""
    return bool(_EXPERTS.search(name))
