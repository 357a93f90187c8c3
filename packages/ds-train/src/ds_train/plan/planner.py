"""A plan: what each pipeline rank holds, and how long a step takes.

Idle time is that of arXiv 2412.19437, table 2; what is shared out in which way, of its section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from ds_model import ModelConfig, parameters_by_part
from ds_train.errors import TrainConfigError
from ds_train.parallel.layout import blocks_of_stages
from ds_train.parallel.schedules import Costs, make_schedule, published_bubble
from ds_train.plan.cluster import Cluster
from ds_train.plan.recipe import PlanError, Recipe
from ds_train.plan.work import TokenWork, Work

GIB = 2.0**30
RUNTIME = 3 * GIB  # drivers, programs, what collectives hold, what allocators lose
_WEIGHT = {"float32": 4, "bfloat16": 2, "fp8": 2}  # bytes of a weight that products read
_GRADIENT = 4
_OPTIMIZER = {"float32": 8, "bfloat16": 8, "fp8": 8}  # master weight and 16-bit moments; float32's


@dataclass(frozen=True)
class Plan:
    """What comes of a recipe.

    Attributes:
        recipe: as given.
        cluster: as given.
        memory: for each pipeline rank the bytes of one of its devices, by what they are for.
        seconds: of a step, by what takes them. Where exchange is hidden, what stands for it is what
            it takes away from computing (`Cluster.exchange_share`), and what of it lasts longer.
        parameters: of the model, MTP modules included.
        flops: of a token, forwards and backwards, nothing made again.
    """

    recipe: Recipe
    cluster: Cluster
    memory: tuple[dict[str, float], ...]
    seconds: dict[str, float]
    parameters: int
    flops: float

    @property
    def busiest(self) -> int:
        """The pipeline rank that holds most."""
        return max(range(len(self.memory)), key=lambda rank: sum(self.memory[rank].values()))

    @property
    def peak(self) -> float:
        """Bytes on a device of that rank."""
        return sum(self.memory[self.busiest].values())

    @property
    def fits(self) -> bool:
        """Whether all devices have room."""
        return self.peak <= self.cluster.memory * GIB

    @property
    def step_seconds(self) -> float:
        """Of a step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        recipe = self.recipe
        return recipe.batch * recipe.sequence / self.step_seconds / recipe.devices

    @property
    def utilisation(self) -> float:
        """Share of what products alone would reach; nothing made again counts."""
        peak = self.cluster.products[self.recipe.precision] * 1e12
        return self.tokens_per_second * self.flops / peak

    def device_hours(self, tokens: float) -> float:
        """Return the hours of all devices together that training on so many tokens takes."""
        return tokens / self.tokens_per_second / 3600

    def days(self, tokens: float) -> float:
        """Return how long that takes."""
        return self.device_hours(tokens) / self.recipe.devices / 24

    def price(self, tokens: float) -> float:
        """Return what that costs, dollars."""
        return self.device_hours(tokens) * self.cluster.price


@dataclass(frozen=True)
class _Pass:
    """One micro-batch through one rank's blocks, seconds.

    Attributes:
        forward: F.
        backward: B, both halves.
        weights: W.
        out: exchange of a forward pass.
        back: and of a backward one.
    """

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0
    out: float = 0.0
    back: float = 0.0

    def __add__(self, other: _Pass) -> _Pass:
        mine, theirs = vars(self), vars(other)
        return _Pass(**{name: value + theirs[name] for name, value in mine.items()})


def make_plan(config: ModelConfig, cluster: Cluster, recipe: Recipe) -> Plan:
    """Work out a recipe.

    Args:
        config: the model; its MTP modules are trained too.
        cluster: where.
        recipe: how.

    Raises:
        PlanError: the recipe does not fit the model, the schedule or the cluster.
    """
    return _Planner(config, cluster, recipe).plan()


class _Planner:
    def __init__(self, config: ModelConfig, cluster: Cluster, recipe: Recipe) -> None:
        needed = {recipe.precision} | ({"bfloat16"} if recipe.precision == "fp8" else set())
        if not needed <= cluster.products.keys():
            known = ", ".join(cluster.products)
            raise PlanError(
                f"precision is {recipe.precision!r}; {cluster.name} is known to compute in {known}"
            )
        experts = config.n_routed_experts or 0
        if recipe.ep > 1 and (not experts or experts % recipe.ep):
            raise PlanError(f"ep is {recipe.ep}; it must divide n_routed_experts = {experts}")
        self.config, self.cluster, self.recipe = config, cluster, recipe
        self.tokens = TokenWork(config, recipe)
        self.parts = parameters_by_part(config)
        try:
            # Few micro-batches show as well what each rank holds.
            count = min(recipe.micro_batches, 2 * recipe.pp + recipe.micro_batches % 2)
            self.pipeline = _pipeline(recipe.schedule, recipe.pp, count)
            self.blocks = _blocks(config, self.pipeline)
        except TrainConfigError as error:
            raise PlanError(str(error)) from error
        except ValueError as error:
            raise PlanError(f"{error} (batch is {recipe.batch})") from error

    def plan(self) -> Plan:
        ranks = range(self.recipe.pp)
        return Plan(
            recipe=self.recipe,
            cluster=self.cluster,
            memory=tuple(self._memory(rank) for rank in ranks),
            seconds=self._seconds(),
            parameters=sum(part.shared + part.experts for part in self.parts.values()),
            flops=self._flops(),
        )

    # ------------------------------------------------------------ memory

    def _memory(self, rank: int) -> dict[str, float]:
        recipe, held = self.recipe, self.pipeline.held[rank]
        shared = experts = 0.0
        for name in self._names(held):
            shared += self.parts[name].shared
            experts += self.parts[name].experts / recipe.ep
        twice = 2 if recipe.schedule == "dualpipe" else 1  # each stage lies at two ranks
        numbers = shared + experts
        owned = numbers
        if recipe.zero:
            owned = shared / (recipe.ep * recipe.dp * twice) + experts / (recipe.dp * twice)
        kept = self._activations(rank)
        found = {
            "weights": numbers * _WEIGHT[recipe.precision],
            "gradients": numbers * _GRADIENT,
            "master weights and moments": owned * _OPTIMIZER[recipe.precision],
            "activations": kept,
        }
        if self.pipeline.stages - 1 in held:
            logits = 2 * 4 * self.config.vocab_size * recipe.tokens
            found["logits and their gradient"] = logits
        if recipe.ep > 1:
            chosen = self.config.num_experts_per_tok or 0
            rows = recipe.tokens * chosen * self.config.hidden_size
            found["exchange"] = 2 * rows * self.tokens.size
        found["runtime"] = RUNTIME
        return found

    def _names(self, stages: tuple[int, ...]) -> Iterator[str]:
        """Name the parts that a rank of these stages holds."""
        c, last = self.config, self.pipeline.stages - 1
        both = c.tie_word_embeddings or c.num_nextn_predict_layers
        if 0 in stages or (last in stages and both):
            yield "embed_tokens"
        for stage in stages:
            for i in self.blocks[stage]:
                yield f"blocks.{i}"
        if last in stages:
            yield from (name for name in self.parts if name in ("norm", "lm_head"))
            yield from (f"mtp.{k}" for k in range(c.num_nextn_predict_layers))

    def _activations(self, rank: int) -> float:
        """Return the bytes of activations that a rank holds at most."""
        kept = {
            stage: self.recipe.tokens * sum(work.kept for work in self._works(stage))
            for stage in self.pipeline.held[rank]
        }
        most = max(
            sum(count * kept[stage] for stage, count in counts)
            for counts in self.pipeline.flights[rank]
        )
        chunks, ranks = self.recipe.chunks, self.recipe.pp
        if chunks > 1:
            # arXiv 2104.04473, section 2.2: with interleaving a rank holds (ranks - 1) (chunks - 1)
            # / chunks micro-batches more, if there are so many.
            (whole,) = kept.values()
            more = (ranks - 1) * (1 - 1 / chunks) * whole
            most = min(most + more, self.recipe.micro_batches * whole)
        return most

    # ------------------------------------------------------------ time

    def _works(self, stage: int) -> list[Work]:
        c = self.config
        found = [self.tokens.block(f"blocks.{i}", c.is_moe_layer(i)) for i in self.blocks[stage]]
        if stage == self.pipeline.stages - 1:
            moe = c.is_moe_layer(c.num_hidden_layers)
            found += [self.tokens.block(f"mtp.{k}", moe) for k in range(c.num_nextn_predict_layers)]
            found.append(self.tokens.end())
        return found

    def _pass(self, stage: int) -> _Pass:
        cluster, recipe = self.cluster, self.recipe
        tokens = recipe.tokens
        precision = recipe.precision
        rate = cluster.products[precision] * 1e12 / tokens
        high = cluster.products["bfloat16" if precision == "fp8" else precision] * 1e12 / tokens
        forwards = cluster.attention * 1e12 / tokens
        backwards = cluster.attention_backward * 1e12 / tokens
        memory = cluster.bandwidth * 1e9 / tokens
        total = _Pass()
        for work in self._works(stage):
            weights = work.products / rate + work.high / high
            again = work.again / rate + work.again_passes / memory
            total += _Pass(
                forward=weights + work.core / forwards + work.passes / memory,
                # Attention's core backwards: five products for two, as the scores are made again.
                backward=2 * (weights + work.passes / memory) + 2.5 * work.core / backwards + again,
                weights=weights,
            )
        layers = self._expert_layers(stage)
        if recipe.ep > 1 and layers:
            travel = self.tokens.travel(cluster)
            hidden = self.config.hidden_size * tokens * layers
            # To the experts in the products' own numbers, back in 16 bits; backwards as well.
            copy = hidden * (self.tokens.narrow + self.tokens.size)
            seconds = max(
                copy * travel.near / (cluster.near * 1e9), copy * travel.far / (cluster.far * 1e9)
            )
            total += _Pass(out=seconds, back=seconds)
        return total

    def _expert_layers(self, stage: int) -> int:
        c = self.config
        layers = sum(c.is_moe_layer(i) for i in self.blocks[stage])
        if stage == self.pipeline.stages - 1 and c.is_moe_layer(c.num_hidden_layers):
            layers += c.num_nextn_predict_layers
        return layers

    def _seconds(self) -> dict[str, float]:
        recipe, kept = self.recipe, self.cluster.kept
        passes = [self._pass(stage) for stage in range(self.pipeline.stages)]
        held = self.pipeline.held
        if recipe.schedule == "dualpipe":  # half of the micro-batches each way
            work = [_mean([passes[stage] for stage in stages]) for stages in held]
        else:
            work = [sum((passes[stage] for stage in stages), _Pass()) for stages in held]
        busiest = max(work, key=lambda p: p.forward + p.backward + p.out + p.back)
        share = 1 - self.cluster.exchange_share if recipe.ep > 1 else 1.0
        computing = (busiest.forward + busiest.backward) / kept
        travelling = busiest.out + busiest.back
        hidden = max(computing / share, travelling)
        pair = hidden if recipe.two_ways else computing + travelling
        costs = Costs(
            forward=busiest.forward / kept + busiest.out,
            backward=busiest.backward / kept + busiest.back,
            weights=busiest.weights / kept,
            overlapped=pair,
        )
        bubble = published_bubble(recipe.schedule, recipe.pp, costs) / recipe.chunks
        if recipe.schedule == "dualpipev":  # its stages are half as long
            bubble /= 2
        count = recipe.micro_batches
        found = {
            "computing": count * computing,
            "exchange that nothing hides": count * (pair - computing),
            "idle in the pipeline": max(bubble, 0.0),
        }
        return found | self._update()

    def _update(self) -> dict[str, float]:
        """Time gradients' sums, the update and new weights' way back."""
        recipe, cluster = self.recipe, self.cluster
        slowest = {"sums of gradients, new weights": 0.0, "update": 0.0}
        for rank in range(recipe.pp):
            shared = experts = 0.0
            for name in self._names(self.pipeline.held[rank]):
                shared += self.parts[name].shared
                experts += self.parts[name].experts / recipe.ep
            travelled = 0.0
            owned = 0.0
            for numbers, replicas in ((shared, recipe.ep * recipe.dp), (experts, recipe.dp)):
                moved = numbers * (_GRADIENT + _WEIGHT[recipe.precision])
                travelled += moved * (1 - 1 / replicas) / self._link
                owned += numbers / (replicas if recipe.zero else 1)
            # Gradient, master weight and moments read, all but the first written.
            touched = owned * (_GRADIENT + 2 * _OPTIMIZER[recipe.precision])
            slowest["sums of gradients, new weights"] = max(
                slowest["sums of gradients, new weights"], travelled
            )
            slowest["update"] = max(slowest["update"], touched / (cluster.bandwidth * 1e9))
        return slowest

    @property
    def _link(self) -> float:
        """Bytes a second of the slowest link that replicas exchange over."""
        inside = self.recipe.ep * self.recipe.dp <= self.cluster.devices_per_node
        return (self.cluster.near if inside else self.cluster.far) * 1e9

    def _flops(self) -> float:
        works = [work for stage in range(self.pipeline.stages) for work in self._works(stage)]
        return sum(3 * (work.products + work.high + work.core) for work in works)


@dataclass(frozen=True)
class _Pipeline:
    """What a plan needs to know of a schedule.

    Attributes:
        stages: how many there are.
        held: for each rank its stages.
        together: as `Schedule.together`.
        flights: for each rank all that it holds at a time: micro-batches by stage.
    """

    stages: int
    held: tuple[tuple[int, ...], ...]
    together: tuple[tuple[int, ...], ...]
    flights: tuple[frozenset[tuple[tuple[int, int], ...]], ...]


@cache
def _pipeline(name: str, ranks: int, micro_batches: int) -> _Pipeline:
    schedule = make_schedule(name, ranks, micro_batches)
    held = tuple(schedule.held_by(rank) for rank in range(ranks))
    flights = tuple(
        frozenset(
            tuple((s, a + b) for s, a, b in zip(held[rank], now.kept, now.waiting, strict=True))
            for now in schedule.holdings(rank)
        )
        for rank in range(ranks)
    )
    return _Pipeline(schedule.stages, held, schedule.together, flights)


@cache
def _blocks(config: ModelConfig, pipeline: _Pipeline) -> list[tuple[int, ...]]:
    return blocks_of_stages(config, pipeline.stages, pipeline.together)


def _mean(passes: list[_Pass]) -> _Pass:
    total = sum(passes, _Pass())
    return _Pass(**{name: value / len(passes) for name, value in vars(total).items()})
