"""Which part of the model lies where: blocks by stage, experts by share, and who holds the same."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ds_model import ModelConfig, ModelPart
from ds_moe import ExpertRanks
from ds_train.errors import TrainConfigError
from ds_train.parallel.mesh import Group, Mesh
from ds_train.parallel.schedules import Schedule

_EXPERTS = re.compile(r"/mlp/(gate_up_proj|down_proj)$")
_BLOCK = re.compile(r"block_(\d+)/")


def blocks_of_stages(config: ModelConfig, stages: int) -> list[tuple[int, ...]]:
    """Deal blocks out to stages, in order, as evenly as can be.

    The last stage has the MTP modules too, each of which counts as a block.

    Args:
        config: of the model.
        stages: how many.

    Returns:
        The blocks of each stage.

    Raises:
        TrainConfigError: there are more stages than blocks.
    """
    layers, depth = config.num_hidden_layers, config.num_nextn_predict_layers
    if stages > layers:
        raise TrainConfigError(
            f"{stages} pipeline stages and num_hidden_layers = {layers}; each stage needs a block"
        )
    if stages == 1:
        return [tuple(range(layers))]
    # The last stage's own blocks: an even share less the modules; the others share the rest.
    last = max(1, min((layers + depth) // stages - depth, layers - stages + 1))
    share, more = divmod(layers - last, stages - 1)
    sizes = [share + (stage < more) for stage in range(stages - 1)] + [last]
    found, first = [], 0
    for size in sizes:
        found.append(tuple(range(first, first + size)))
        first += size
    return found


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
        blocks_of_stages(self.config, self.schedule.stages)

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of each stage."""
        return blocks_of_stages(self.config, self.schedule.stages)

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
