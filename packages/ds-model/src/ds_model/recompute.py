"""What a block keeps for its backward pass, and what it computes again instead.

Gradient checkpointing (arXiv 1604.06174). DeepSeek-V3 recomputes the RMSNorms and the latents'
up-projections alone (arXiv 2412.19437, section 3.2.3): that is "parts". SwiGLU is made again by the
experts' operation in any case.
"""

from __future__ import annotations

from typing import Literal, get_args

import tensorflow as tf

from ds_model.block import DecoderBlock, MTPModule, Window
from ds_moe import Routing

Recompute = Literal["none", "parts", "block"]
"""What runs again in the backward pass: nothing, what is cheap and large, or each block."""


def check_recompute(policy: str) -> None:
    """Raise ValueError unless `policy` is the name of one."""
    known = get_args(Recompute)
    if policy not in known:
        raise ValueError(f"recompute is {policy!r}; it must be one of {', '.join(known)}")


def run_block(
    layer: DecoderBlock | MTPModule, window: Window, recompute: Recompute, *states: tf.Tensor
) -> tuple[tf.Tensor, Routing | None]:
    """Return `layer(*states, window)`, keeping for the backward pass what the policy says.

    Args:
        layer: a block, or an MTP module with its block.
        window: where the tokens lie; no gradient goes there.
        recompute: "none" keeps what every operation needs; "parts" makes norms, queries, keys and
            values of attention again; "block" keeps `states` alone and runs the layer once more
            when its gradient is asked for.
        *states: each `[B, S, D]`.
    """
    if recompute != "block":
        return layer(*states, window, recompute=recompute == "parts")

    # `tf.recompute_grad` makes the second run wait for the gradient by adding a zero made of it
    # to the states: without that TensorFlow would merge both runs into one and keep everything.
    # It takes no keyword arguments in a graph (tensorflow issue 56692) and no output that is
    # None, so the window comes from outside and a dense block gives one tensor.
    @tf.recompute_grad
    def run(*states: tf.Tensor) -> tf.Tensor | tuple[tf.Tensor, ...]:
        h, routing = layer(*states, window)
        return h if routing is None else (h, *routing)

    found = run(*states)
    if isinstance(found, tf.Tensor):
        return found, None
    h, *routing = found
    return h, Routing(*routing)
