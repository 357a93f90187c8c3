"""What one token holds in memory in one block, in closed form; see `ds_train.memory`.

Counted are the tensors that stand between operations when the compiled operations of
`ds-precision` run. A test compares the sums with what traced graphs keep.

Letters: D hidden_size, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C latent
rank, I inner width, E experts, K experts a token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ds_model import ModelConfig, Recompute

WIDE = 4  # bytes of float32, which weights, gradients, moments, scores and logits are in
INDEX = 4  # bytes of int32


@dataclass(frozen=True)
class TokenMemory:
    """Bytes a token.

    Attributes:
        config: the model.
        size: bytes of a number that blocks compute with.
        recompute: what blocks run again; see `CausalLM.forward`.
    """

    config: ModelConfig
    size: int
    recompute: Recompute

    def needed(self, moe: bool, mtp: bool) -> Counter[str]:
        """Count what a block needs backwards: the inputs of its products and norms, first of all.

        Args:
            moe: whether the block has experts.
            mtp: whether it is that of an MTP module, whose own parts count then.
        """
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
        if moe:
            experts, chosen = c.n_routed_experts or 0, c.num_experts_per_tok or 0
            found["experts"] = self._inner(2)
            found["routing"] = experts * WIDE + chosen * (WIDE + INDEX)
            if size < WIDE:
                found["experts"] += c.hidden_size * WIDE  # the router reads float32
        else:
            found["feed-forward"] = 2 * c.intermediate_size * size + INDEX
        if mtp:
            # Both states, both side by side after their norms, and the norm's two sides at the end.
            found["MTP around its block"] = 6 * c.hidden_size * size + 3 * WIDE
        return found

    def held(self, moe: bool, mtp: bool) -> Counter[str]:
        """Count what the forward pass leaves of it; arguments as for `needed`."""
        found, c = self.needed(moe, mtp), self.config
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
        return found

    def waiting(self, moe: bool, mtp: bool) -> int:
        """Count what waits between the backward pass' halves: both sides of each weight's product.

        Arguments as for `needed`.
        """
        c, size = self.config, self.size
        heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        rank = c.q_lora_rank or 0
        # Inputs: of the first products and of the feed-forward, of the expansions, of the output.
        found = (2 * c.hidden_size + rank + c.kv_lora_rank + heads * c.v_head_dim) * size
        # Gradients of results: queries, keys and values, both latents, both halves of the block.
        found += heads * (key + c.qk_nope_head_dim + c.v_head_dim) * size
        found += (rank + c.kv_lora_rank + c.qk_rope_head_dim + 2 * c.hidden_size) * size
        if moe:
            found += self._inner(3) + (c.n_routed_experts or 0) * WIDE
            if size < WIDE:
                found += c.hidden_size * WIDE
        else:
            found += 3 * c.intermediate_size * size + INDEX
        # Both states side by side, their product's gradient; the head's input.
        return found + (4 * c.hidden_size * size if mtp else 0)

    def _inner(self, widths: int) -> int:
        """Count so many inner widths of all experts of a token, and their order."""
        c, width = self.config, widths * (self.config.moe_intermediate_size or 0) * self.size
        found = (c.num_experts_per_tok or 0) * (width + INDEX)
        return found + (c.n_shared_experts * width + INDEX if c.n_shared_experts else 0)

    def head(self) -> int:
        """Count the head's input before and after its norm; the scale, the label, the loss' sum."""
        return 2 * self.config.hidden_size * self.size + 2 * WIDE + INDEX

    def working(self) -> int:
        """Count what a block's backward pass makes in attention, where it is most."""
        c, size = self.config, self.size
        heads, key = c.num_attention_heads, c.qk_nope_head_dim + c.qk_rope_head_dim
        # Gradients of: the residual, output, queries, keys and values, and each head's rotated
        # key in float32.
        values = c.hidden_size + heads * (key + c.qk_nope_head_dim + 2 * c.v_head_dim)
        return values * size + heads * c.qk_rope_head_dim * WIDE

    def scratch(self, moe: bool) -> int:
        """Count what the experts' backward pass works in: thrice their inner width, float32."""
        c = self.config
        if not moe:
            return 3 * WIDE * c.intermediate_size
        width = c.moe_intermediate_size or 0
        return 3 * WIDE * width * max(c.num_experts_per_tok or 0, c.n_shared_experts or 0)
