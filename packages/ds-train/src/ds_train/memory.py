"""What a training step holds in memory, in closed form, without building anything.

Counted are the tensors that stand between operations when the compiled operations of
`ds-precision` run (a CPU with a compiler), at the moments when most of them do:

- the loss: everything that the backward pass needs is there, and the logits with their gradient;
- each block backwards: what is still kept, the gradients that are there already, and what the
  block works with; what `recompute` makes again, or all that a block had kept, comes back here;
- the update: all gradients, and new values beside the old ones, one variable at a time;
- on a pipeline rank, an exchange: what travels lies in several places.

A pipeline rank holds several micro-batches at once. Where the backward pass comes in two halves,
both sides of each weight's product wait in between, which is about as much as was kept before.

Not counted: Python and TensorFlow themselves, the graph, code, what the allocator loses, and what
operations that run at once hold together. Without compiled operations more is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, get_args

from ds_model import ModelConfig, Recompute, parameters_by_part
from ds_train.pipeline_part import Holding, PipelinePart
from ds_train.token_memory import WIDE, TokenMemory

# Of what travels: two rows given, two within the collective, two taken; both ways once in the
# transport; and what is left for the next.
_COPIES = 9


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step holds.

    Attributes:
        parameters: weights, and the routers' biases.
        moments: of AdamW: two numbers a weight.
        gradients: once all are there.
        activations: what the forward pass keeps for the backward one, by part; on a pipeline rank
            when it holds most, with what waits for weights' gradients.
        logits: with their gradient.
        scratch: buffers that the experts' operation keeps from one step to the next.
        moments_in_time: for each moment of the step, what is held beside parameters, moments
            and scratch.
    """

    parameters: int
    moments: int
    gradients: int
    activations: dict[str, int]
    logits: int
    scratch: int
    moments_in_time: dict[str, int]

    @property
    def peak_at(self) -> str:
        """The moment when most is held."""
        return max(self.moments_in_time, key=self.moments_in_time.__getitem__)

    @property
    def step(self) -> int:
        """What comes and goes within a step, at its peak."""
        return self.moments_in_time[self.peak_at]

    @property
    def peak(self) -> int:
        """Everything, at the peak."""
        return self.parameters + self.moments + self.scratch + self.step

    def rows(self) -> list[tuple[str, int]]:
        """Return what a reader wants to see, part by part, the peak last."""
        return [
            ("parameters", self.parameters),
            ("moments", self.moments),
            ("gradients", self.gradients),
            *((f"activations: {name}", size) for name, size in self.activations.items()),
            ("logits and their gradient", self.logits),
            ("scratch of the experts", self.scratch),
            (f"peak ({self.peak_at})", self.peak),
        ]


def training_memory(
    config: ModelConfig,
    batch: int,
    sequence: int,
    dtype_policy: str = "float32",
    recompute: Recompute = "none",
    part: PipelinePart | None = None,
) -> TrainingMemory:
    """Say what one micro-batch of a training step holds, or a pipeline rank's several.

    Args:
        config: the model; its MTP modules are trained too.
        batch: sequences of one micro-batch. With accumulation the summed gradients are held
            beside new ones: add `gradients` once.
        sequence: tokens of one.
        dtype_policy: "float32" or "mixed_bfloat16".
        recompute: what blocks run again; see `CausalLM.forward`.
        part: which part of the model, and how often, as `Layout.memory_part` says; all of it, once,
            if `None`. Every token counts as if the experts of its choice were here.

    Raises:
        ValueError: a size is not positive, or a policy is unknown.
    """
    if recompute not in get_args(Recompute):
        known = ", ".join(get_args(Recompute))
        raise ValueError(f"recompute is {recompute!r}; it must be one of {known}")
    if batch < 1 or sequence <= config.num_nextn_predict_layers:
        raise ValueError(
            f"batch is {batch} and sequence {sequence}; they must be 1 or more, and sequence more "
            f"than the {config.num_nextn_predict_layers} MTP modules"
        )
    sizes = {"float32": 4, "mixed_bfloat16": 2}
    if dtype_policy not in sizes:
        raise ValueError(f"dtype_policy is {dtype_policy!r}; it must be one of {', '.join(sizes)}")
    part = part or PipelinePart((tuple(range(config.num_hidden_layers)),))
    memory = TokenMemory(config, sizes[dtype_policy], recompute)
    return _Step(memory, batch, sequence, part).report()


class _Block(NamedTuple):
    """Of one block, for all tokens of a micro-batch, bytes.

    Attributes:
        number: of the block; MTP modules come behind the model's own.
        needed: backwards.
        held: until then.
        waiting: between the backward pass' halves.
        working: in its backward pass.
        scratch: of its experts.
    """

    number: int
    needed: int
    held: Counter[str]
    waiting: int
    working: int
    scratch: int


class _Stage:
    """One stage, for one micro-batch, bytes.

    Attributes:
        blocks: in order.
        head: what the head keeps.
        logits: of all depths.
    """

    def __init__(self, step: _Step, numbers: tuple[int, ...], end: bool) -> None:
        c = step.memory.config
        depth = c.num_nextn_predict_layers if end else 0
        self.blocks = [step.block(number, 0) for number in numbers]
        self.blocks += [step.block(c.num_hidden_layers + k, k + 1) for k in range(depth)]
        self.head = step.tokens(0) * step.memory.head() if end else 0
        scored = sum(step.tokens(k) for k in range(depth + 1)) if end else 0
        self.logits = scored * c.vocab_size * WIDE
        # Of the head's product what waits: its input, and its result's gradient, which is narrow.
        states = step.tokens(0) * c.hidden_size * step.memory.size if end else 0
        self._head_waiting = states + self.logits * step.memory.size // WIDE

    @property
    def activations(self) -> Counter[str]:
        """Count what the forward pass leaves, logits apart."""
        return sum((block.held for block in self.blocks), Counter({"head": self.head}))

    @property
    def kept(self) -> int:
        """Count all that it leaves."""
        return self.activations.total() + self.logits

    @property
    def waiting(self) -> int:
        """Count what waits between the backward pass' halves."""
        return sum(block.waiting for block in self.blocks) + self._head_waiting

    def backwards(self, again: bool, split: bool) -> Iterator[tuple[str, int, int]]:
        """Say what is held as the backward pass goes on.

        Args:
            again: whether blocks run again.
            split: whether weights' gradients come later.

        Yields:
            A name, bytes, and how many blocks have their gradients then.
        """
        if self.logits:
            yield "the loss", self.kept + self.logits, 0
        waiting = self._head_waiting if split else 0
        for i in reversed(range(len(self.blocks))):
            block = self.blocks[i]
            below = sum(other.held.total() for other in self.blocks[: i + 1])
            # Of a block that runs again its input stands beside all that it makes.
            returned = block.needed - (0 if again else block.held.total())
            held = below + block.working + returned + waiting
            yield f"block {block.number} backwards", held, len(self.blocks) - i
            waiting += block.waiting if split else 0


@dataclass(frozen=True)
class _Step:
    memory: TokenMemory
    batch: int
    sequence: int
    part: PipelinePart

    def report(self) -> TrainingMemory:
        c, part = self.memory.config, self.part
        last = len(part.stages) - 1
        stages = [
            _Stage(self, numbers, part.end and at == last) for at, numbers in enumerate(part.stages)
        ]
        shared, experts = self._parameters()
        parameters = shared + experts
        owned = shared / (part.ep * part.zero) + experts / part.zero if part.zero else parameters
        moments = {"the update": WIDE * (parameters + 2 * _largest(c))}
        for name, held in self._moments(stages, parameters):
            moments[name] = max(held, moments.get(name, 0))
        return TrainingMemory(
            parameters=WIDE * parameters,
            moments=2 * WIDE * round(owned),
            gradients=WIDE * parameters,
            activations=self._activations(stages),
            logits=2 * stages[-1].logits,
            scratch=max(block.scratch for stage in stages for block in stage.blocks),
            moments_in_time=moments,
        )

    def tokens(self, depth: int) -> int:
        return self.batch * (self.sequence - depth)

    def block(self, number: int, depth: int) -> _Block:
        """Count one block; `depth` is that of its MTP module, 0 if it is in none."""
        memory, c, tokens = self.memory, self.memory.config, self.tokens(depth)
        kind = c.is_moe_layer(min(number, c.num_hidden_layers)), depth > 0
        held = {name: tokens * size for name, size in memory.held(*kind).items() if size}
        return _Block(
            number,
            tokens * memory.needed(*kind).total(),
            Counter(held),
            tokens * memory.waiting(*kind),
            tokens * memory.working(),
            tokens * memory.scratch(kind[0]),
        )

    def _moments(self, stages: list[_Stage], parameters: int) -> Iterator[tuple[str, int]]:
        c = self.memory.config
        # Blocks' shares of the weights differ little from equal ones, so far as memory goes.
        outside = 2 * c.vocab_size * c.hidden_size
        share = max(parameters - outside, 0) / sum(len(stage.blocks) for stage in stages)
        state = self.tokens(0) * c.hidden_size * self.memory.size
        for now in self.part.holdings:
            everything = self._held(stages, now)
            if now.doing is None:
                if self.part.rows:
                    yield "an exchange", everything + _COPIES * self.part.rows * state
                continue
            if now.doing == "W":
                yield "gradients put off", everything + WIDE * parameters
                continue
            stage = stages[now.at]
            others = everything - stage.kept
            again, split = self.memory.recompute == "block", now.doing == "I"
            for name, held, done in stage.backwards(again, split):
                gradients = WIDE * (outside // 2 + share * done) if done else 0
                yield name, round(others + held + gradients)

    def _held(self, stages: list[_Stage], now: Holding) -> int:
        found = 0
        for stage, kept, waiting in zip(stages, now.kept, now.waiting, strict=True):
            found += kept * stage.kept + waiting * stage.waiting
        return found

    def _activations(self, stages: list[_Stage]) -> dict[str, int]:
        most = max(self.part.holdings, key=lambda now: self._held(stages, now))
        found = Counter[str]()
        for stage, kept, waiting in zip(stages, most.kept, most.waiting, strict=True):
            found.update({name: kept * size for name, size in stage.activations.items()})
            found["logits of other micro-batches"] += max(kept - 1, 0) * stage.logits
            found["what weights' gradients wait for"] += waiting * stage.waiting
        return {name: size for name, size in found.items() if size}

    def _parameters(self) -> tuple[int, int]:
        """Count the numbers that all replicas have, and those of the experts here."""
        c, part, parts = self.memory.config, self.part, parameters_by_part(self.memory.config)
        names = [f"blocks.{i}" for stage in part.stages for i in stage]
        if part.embedding:
            names.append("embed_tokens")
        if part.end:
            names += [name for name in ("norm", "lm_head") if name in parts]
            names += [f"mtp.{k}" for k in range(c.num_nextn_predict_layers)]
        shared = sum(parts[name].shared for name in names)
        return shared, sum(parts[name].experts for name in names) // part.ep


def _largest(config: ModelConfig) -> int:
    """Numbers in the largest variable."""
    c = config
    experts = (c.n_routed_experts or 0, c.hidden_size, 2 * (c.moe_intermediate_size or 0))
    dense = c.hidden_size * 2 * c.intermediate_size
    return max(prod(experts), dense, c.vocab_size * c.hidden_size)
