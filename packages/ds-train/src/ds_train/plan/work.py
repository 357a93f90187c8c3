"""What one token costs in one block: arithmetic, passes over memory, bytes kept and exchanged.

Training as DeepSeek-V3's (arXiv 2412.19437, section 3): in FP8 the inputs of products and what
SwiGLU was applied to are kept in 8 bits, attention's output in 12; residuals and latents in 16.

Letters as in the papers: D hidden_size, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V
v_head_dim, C kv_lora_rank, I inner width, E experts, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ds_model import ModelConfig, parameters_by_part
from ds_train.plan.cluster import Cluster
from ds_train.plan.recipe import Recipe

_SIZES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 2.0}  # of residuals, queries, keys, values
_TILE = 4 / 128  # bytes of a number's share in its tile's scale


class Work(NamedTuple):
    """Of one token.

    Attributes:
        products: FLOP of a forward pass through matrices.
        high: of products that stay in 16 bits under FP8: the head's.
        core: FLOP of attention's core, forwards.
        passes: bytes read and written by all that is no product, forwards.
        again: FLOP of products that the backward pass makes again.
        again_passes: bytes of passes that it makes again.
        kept: bytes held until the backward pass.
    """

    products: float
    high: float
    core: float
    passes: float
    again: float
    again_passes: float
    kept: float


class Travel(NamedTuple):
    """What a token's exchange moves one way, as copies of its hidden state.

    Attributes:
        near: copies sent to devices.
        far: copies sent to other nodes.
    """

    near: float
    far: float


@dataclass(frozen=True)
class TokenWork:
    """The work of each kind of block under a recipe."""

    config: ModelConfig
    recipe: Recipe

    @property
    def size(self) -> float:
        """Bytes of a number outside products."""
        return _SIZES[self.recipe.precision]

    @property
    def narrow(self) -> float:
        """Bytes of a number that is a product's input."""
        return 1 + _TILE if self.recipe.precision == "fp8" else self.size

    def block(self, name: str, moe: bool) -> Work:
        """Return the work of a block.

        Args:
            name: of `parameters_by_part`.
            moe: whether it has experts.
        """
        c, size, narrow = self.config, self.size, self.narrow
        chosen, experts = c.num_experts_per_tok or 0, c.n_routed_experts or 1
        part = parameters_by_part(c)[name]
        products = 2.0 * (part.shared + part.experts * chosen / experts)
        key = c.qk_nope_head_dim + c.qk_rope_head_dim
        heads, hidden = c.num_attention_heads, c.hidden_size
        # Causal: a token sees half of the sequence, on average.
        core = 2.0 * heads * (key + c.v_head_dim) * self.recipe.sequence / 2
        latents = (c.q_lora_rank or 0) + c.kv_lora_rank + c.qk_rope_head_dim
        expanded = heads * (2 * key + c.v_head_dim)
        up_keys = (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
        ups = heads * (key * (c.q_lora_rank or 0) + up_keys)
        if moe:
            width = c.moe_intermediate_size or 0
            inner = width * (chosen + (c.n_shared_experts or 0))
        else:
            inner = c.intermediate_size

        norms = 2 * 5 * hidden * size  # twice: the residual read and summed, the norm read, written
        swiglu = inner * (2 * size + narrow)
        passes = norms + swiglu + 4 * heads * key * size  # rotation and joining of keys
        if narrow < size:  # rounding inputs of products
            passes += (size + narrow) * (2 * hidden + latents + heads * c.v_head_dim)
        kept = 2 * hidden * size + latents * size  # residuals, latents
        if self.recipe.precision == "fp8":
            kept += heads * c.v_head_dim * 1.5  # E5M6
        else:
            kept += heads * c.v_head_dim * size
        kept += heads * 4 + 2 * inner * narrow  # sums of attention; gate and up
        if moe:
            kept += chosen * hidden * narrow + experts * 4 + chosen * 8  # what came; scores, choice
            passes += 2 * chosen * hidden * (narrow + size) + 2 * experts * 4  # to experts and back
        if self.recipe.recompute == "none":
            kept += 2 * hidden * narrow + expanded * size + inner * narrow + latents * size
        again, again_passes = 0.0, 0.0
        if self.recipe.recompute == "parts":
            again, again_passes = 2.0 * ups, norms / 2 + swiglu
        elif self.recipe.recompute == "block":
            again, again_passes, kept = products + core, passes, hidden * size
        return Work(products, 0.0, core, passes, again, again_passes, kept)

    def end(self) -> Work:
        """Return the work behind the last block: norm, head and loss; MTP modules are blocks."""
        c, size = self.config, self.size
        parts = parameters_by_part(c)
        head = parts.get("lm_head", parts["embed_tokens"]).shared
        times = 1 + c.num_nextn_predict_layers
        return Work(
            products=0.0,
            high=2.0 * head * times,
            core=0.0,
            passes=times * (5 * c.hidden_size * size + 3 * 4 * c.vocab_size),
            again=0.0,
            again_passes=0.0,
            kept=times * 2 * c.hidden_size * size,
        )

    def travel(self, cluster: Cluster) -> Travel:
        """Return how many copies of a token leave its device, on the average, if all are equal.

        With node-limited routing (section 2.1.2) a token's experts lie on few nodes; it goes to
        each once, and on to devices there.
        """
        c, ep = self.config, self.recipe.ep
        chosen = c.num_experts_per_tok or 0
        nodes = max(1, ep // cluster.devices_per_node)
        groups = c.n_group or 1
        best = c.topk_group or 1
        if groups == 1:  # no limit
            groups = best = nodes
        open_nodes = nodes * best / groups if nodes > groups else float(min(nodes, best))
        on_nodes = _distinct(open_nodes, chosen)
        on_devices = _distinct(open_nodes * ep / nodes, chosen)
        return Travel(
            near=on_devices * (1 - 1 / ep),
            far=on_nodes * (1 - 1 / nodes),
        )


def _distinct(places: float, draws: int) -> float:
    """Return how many places are hit by so many draws, on the average."""
    return places * (1 - (1 - 1 / places) ** draws) if places > 1 else float(min(draws, 1))
