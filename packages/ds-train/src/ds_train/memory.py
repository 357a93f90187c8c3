"""What a training step holds in memory, in closed form, without building anything.

Counted are the tensors that stand between operations when the compiled operations of
`ds-precision` run (a CPU with a compiler), at the moments when most of them do:

- the loss: everything that the backward pass needs is there, and the logits with their gradient;
- each block backwards: what is still kept, the gradients that are there already, and what the
  block works with; what `recompute` makes again, or all that a block had kept, comes back here;
- the update: all gradients, and new values beside the old ones, one variable at a time.

Not counted: Python and TensorFlow themselves, the graph, code, the allocator's slack, and what
operations that run at once hold together: a measured peak was within 1% with one
inter-operation thread, 14% to 26% higher with two. Without compiled operations more is kept.

Letters: B batch, S sequence, D hidden_size, H heads, N qk_nope_head_dim, R qk_rope_head_dim,
V v_head_dim, C latent rank, I inner width, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import get_args

from ds_model import ModelConfig, Recompute, parameters_by_part

WIDE = 4  # bytes of float32, which weights, gradients, moments, scores and logits are in
INDEX = 4  # bytes of int32


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that a training step holds.

    Attributes:
        parameters: weights, and the routers' biases.
        moments: of AdamW: two numbers a weight.
        gradients: once all are there.
        activations: what the forward pass keeps for the backward one, by part.
        logits: with their gradient.
        scratch: buffers that the experts' operation keeps from one step to the next, for one of
            TensorFlow's inter-operation threads; each that happens to run it has its own.
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
        part: which part of the model, and how often; all of it, once, if `None`.

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
    part = part or PipelinePart(tuple(range(config.num_hidden_layers)))
    return _Step(config, batch, sequence, sizes[dtype_policy], recompute, part).report()


@dataclass(frozen=True)
class PipelinePart:
    """What a pipeline rank has.

    Attributes:
        blocks: numbers of its blocks.
        embedding: whether it has the embedding.
        end: whether it has what follows the last block.
        in_flight: micro-batches whose activations it holds at once; see
            `Schedule.peak_activations`.
    """

    blocks: tuple[int, ...]
    embedding: bool = True
    end: bool = True
    in_flight: int = 1


@dataclass(frozen=True)
class _Step:
    config: ModelConfig
    batch: int
    sequence: int
    size: int  # bytes of a number that blocks compute with
    recompute: Recompute
    part: PipelinePart

    def report(self) -> TrainingMemory:
        c, part = self.config, self.part
        depth = c.num_nextn_predict_layers if part.end else 0
        blocks = [(c.is_moe_layer(i), self._tokens(0)) for i in part.blocks]
        mtp = [(c.is_moe_layer(c.num_hidden_layers), self._tokens(k + 1)) for k in range(depth)]
        # Of each block: what it needs backwards, what it holds until then, and its tokens.
        stack = [(self._kept(moe), self._held(moe, mtp=False), n) for moe, n in blocks]
        stack += [
            (self._kept(moe) + self._mtp_kept(), self._held(moe, mtp=True), n) for moe, n in mtp
        ]
        held = [
            Counter({name: tokens * size for name, size in part.items() if size})
            for _, part, tokens in stack
        ]
        # The head's input before and after its norm; the norm's scale, the label, the loss' sum.
        ends = Counter[str]()
        if part.end:
            ends["head"] = self._tokens(0) * (2 * c.hidden_size * self.size + 2 * WIDE + INDEX)
        scored = sum(self._tokens(k) for k in range(depth + 1)) if part.end else 0
        logits = 2 * scored * c.vocab_size * WIDE
        parameters = self._parameters()
        activations = sum((Counter(kept) for kept in held), ends)
        activations = Counter({name: part.in_flight * n for name, n in activations.items()})
        return TrainingMemory(
            parameters=WIDE * parameters,
            moments=2 * WIDE * parameters,
            gradients=WIDE * parameters,
            activations=dict(activations),
            logits=logits,
            scratch=self._scratch(blocks + mtp),
            moments_in_time=self._moments(stack, held, ends["head"], logits, parameters),
        )

    def _moments(
        self,
        stack: list[tuple[Counter[str], Counter[str], int]],
        held: list[Counter[str]],
        head: int,
        logits: int,
        parameters: int,
    ) -> dict[str, int]:
        kept = [sum(part.values()) for part in held]
        others = (self.part.in_flight - 1) * (sum(kept) + head)  # of other micro-batches
        found = {"the loss": others + sum(kept) + head + logits}
        # Blocks' shares of the weights differ little from equal ones, so far as memory goes.
        outside = 2 * self.config.vocab_size * self.config.hidden_size
        share = max(parameters - outside, 0) / len(stack)
        for i in reversed(range(len(stack))):
            needed, waiting, tokens = stack[i]
            gradients = WIDE * (outside // 2 + share * (len(stack) - i))
            works = tokens * self._working()
            # Of a block that runs again its input stands beside all that it makes.
            again = self.recompute == "block"
            returned = tokens * (sum(needed.values()) - (0 if again else sum(waiting.values())))
            here = others + sum(kept[: i + 1]) + gradients + works + returned
            found[f"block {i} backwards"] = round(here)
        found["the update"] = WIDE * (parameters + 2 * _largest(self.config))
        return found

    def _parameters(self) -> int:
        c, part, parts = self.config, self.part, parameters_by_part(self.config)
        names = [f"blocks.{i}" for i in part.blocks]
        if part.embedding:
            names.append("embed_tokens")
        if part.end:
            names += [name for name in ("norm", "lm_head") if name in parts]
            names += [f"mtp.{k}" for k in range(c.num_nextn_predict_layers)]
        return sum(parts[name].shared + parts[name].experts for name in names)

    def _tokens(self, depth: int) -> int:
        return self.batch * (self.sequence - depth)

    def _held(self, moe: bool, mtp: bool) -> Counter[str]:
        """What the forward pass leaves of one token in one block."""
        found, c = self._kept(moe), self.config
        if self.recompute == "block":
            states = 3 if mtp else 1  # an MTP module: two ways in, and what it gives to the head
            inputs = states * c.hidden_size * self.size
            return Counter({"block inputs": inputs, "routing": found["routing"]})
        if self.recompute == "parts":
            found["residuals and norms"] -= 2 * (c.hidden_size * self.size + WIDE)
            if moe and self.size < WIDE:
                found["experts"] -= c.hidden_size * WIDE  # what the router reads
            latents = (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim
            found["latents"] = latents * self.size
            found["queries, keys, values"] = 0
        return found + self._mtp_kept() if mtp else found

    def _kept(self, moe: bool) -> Counter[str]:
        """What a block keeps of one token: the inputs of its products and norms, first of all."""
        c, size = self.config, self.size
        heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        rank = c.q_lora_rank or 0
        found = Counter[str]()
        # Twice: what the norm was given and what it gave, and its scale.
        found["residuals and norms"] = 2 * (2 * c.hidden_size * size + WIDE)
        # Both latents before and after their norms; the rotated key.
        latents = 2 * rank + 2 * c.kv_lora_rank + c.qk_rope_head_dim
        found["latents"] = latents * size + (WIDE if rank else 0) + WIDE
        expanded = key + c.qk_nope_head_dim + c.v_head_dim  # a head's query, key and value
        found["queries, keys, values"] = heads * expanded * size
        found["attention's output"] = heads * (c.v_head_dim * size + WIDE)
        if not moe:
            found["feed-forward"] = 2 * c.intermediate_size * size + INDEX
            return found
        experts, chosen = c.n_routed_experts or 0, c.num_experts_per_tok or 0
        width = c.moe_intermediate_size or 0
        found["experts"] = chosen * (2 * width * size + INDEX)
        if c.n_shared_experts:
            found["experts"] += 2 * width * c.n_shared_experts * size + INDEX
        found["routing"] = experts * WIDE + chosen * (WIDE + INDEX)
        if size < WIDE:
            found["experts"] += c.hidden_size * WIDE  # the router reads float32
        return found

    def _mtp_kept(self) -> Counter[str]:
        """What an MTP module keeps of one token around its block."""
        c = self.config
        # Both states, both side by side after their norms, and the norm's two sides at the end.
        return Counter({"MTP around its block": 6 * c.hidden_size * self.size + 3 * WIDE})

    def _working(self) -> int:
        """What a block's backward pass makes of one token, in attention, where it is most."""
        c, size = self.config, self.size
        heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        # Gradients of: the residual, output, queries, keys and values, and each head's rotated
        # key in float32.
        values = c.hidden_size + heads * (key + c.qk_nope_head_dim + 2 * c.v_head_dim)
        return values * size + heads * c.qk_rope_head_dim * WIDE

    def _scratch(self, layers: list[tuple[bool, int]]) -> int:
        """What the experts' backward pass works in: three times their inner width, float32."""
        c = self.config
        most = 0
        for moe, tokens in layers:
            width = c.moe_intermediate_size or 0
            inner = width * max(c.num_experts_per_tok or 0, c.n_shared_experts or 0)
            most = max(most, tokens * (inner if moe else c.intermediate_size))
        return 3 * WIDE * most


def _largest(config: ModelConfig) -> int:
    """Numbers in the largest variable."""
    c = config
    experts = (c.n_routed_experts or 0, c.hidden_size, 2 * (c.moe_intermediate_size or 0))
    dense = c.hidden_size * 2 * c.intermediate_size
    return max(prod(experts), dense, c.vocab_size * c.hidden_size)
