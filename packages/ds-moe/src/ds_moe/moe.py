"""DeepSeekMoE: shared experts for every token, routed ones for some (arXiv 2412.19437, eq. 12).

Shape letters: B batch, S sequence, T tokens, D hidden_size, I moe_intermediate_size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike

from ds_moe.config import MoEConfig
from ds_moe.copies import Copies, move_experts
from ds_moe.deferred_experts import deferred_experts
from ds_moe.exchange import ExpertRanks, run_on_ranks
from ds_moe.experts import run_experts
from ds_moe.fp8_experts import fp8_experts
from ds_moe.router import Router, Routing
from ds_moe.swiglu import SwiGLU
from ds_precision import (
    QuantizedWeights,
    RestoresPolicy,
    check_mode,
    deferred_weight_gradients,
    exchange_weight,
    experts_done,
    fp8_recipe,
    quantize_weights,
    replace_weights,
    takes_any_mode,
    use_kernels,
)


@keras.saving.register_keras_serializable(package="ds_moe")
class MixtureOfExperts(RestoresPolicy, keras.layers.Layer):
    """Routed experts plus shared ones; dropless.

    The forward pass changes no variable: the routing comes back beside the output, and
    `update_biases` is called once an optimizer step with the loads summed.

    Args:
        config: sizes and rules; a mapping of `MoEConfig`'s fields is accepted too.
        **kwargs: of `keras.layers.Layer`.
    """

    def __init__(self, config: MoEConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        takes_any_mode(self)
        self.config = config if isinstance(config, MoEConfig) else MoEConfig(**config)
        c = self.config
        self.gate = Router(c, name="gate")
        self.shared_experts = None
        if c.n_shared_experts:
            self.shared_experts = SwiGLU(
                c.hidden_size,
                c.moe_intermediate_size * c.n_shared_experts,
                c.initializer_range,
                dtype=self.dtype_policy,
                name="shared_experts",
            )
        self._ranks: ExpertRanks | None = None
        self._copies: Copies | None = None

    def deal_out(self, ranks: ExpertRanks) -> None:
        """Hold this rank's share of the routed experts alone; the others' are asked by `ranks`.

        Router and shared experts stay whole. The share is drawn as part of all experts, so that
        ranks together hold what one would.

        Args:
            ranks: who holds the experts, and carries tokens between them.

        Raises:
            ValueError: the layer has its weights already, or the ranks do not divide its experts.
        """
        if self.built:
            raise ValueError(f"{self.path} has its weights already; deal experts out before that")
        if self.config.n_routed_experts % ranks.size:
            raise ValueError(
                f"{self.config.n_routed_experts} experts can't be shared out evenly to "
                f"{ranks.size} ranks"
            )
        self._ranks = ranks

    def place(self, held: ArrayLike) -> None:
        """Let busy experts lie on several ranks, for inference; all ranks call this together.

        Weights move to where they are to lie, and do not train any more. May be called again, as
        the load that is seen changes. A function that was traced before goes on with the weights
        that it knew: trace it anew.

        Args:
            held: `[P]`: the expert that each copy is of, rank by rank; a row of
                `Placement.physical_to_logical`.

        Raises:
            ValueError: the layer has no weights yet, its experts are not dealt out or are small
                ones, ranks do not divide the copies, or an expert has none.
        """
        ranks = self._ranks
        if ranks is None or not self.built or self.gate_up_proj is None:
            raise ValueError(
                f"{self.path}: copies need experts that are dealt out, built, not small"
            )
        after = Copies.of(held, self.config.n_routed_experts)
        if len(after.held) % ranks.size:
            raise ValueError(f"{len(after.held)} copies can't lie evenly on {ranks.size} ranks")
        experts = self.config.n_routed_experts
        before = self._copies or Copies.of(np.arange(experts), experts)
        for name in ("gate_up_proj", "down_proj"):
            stack = tf.convert_to_tensor(getattr(self, name))
            moved = move_experts(stack, before, after, ranks)
            setattr(self, name, *exchange_weight(self, name, {name: moved}))
        self._copies = after

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the router and the stacked experts."""
        c = self.config
        if input_shape[-1] != c.hidden_size:
            raise ValueError(
                f"input has {input_shape[-1]} features; hidden_size is {c.hidden_size}"
            )
        self.gate.build((None, c.hidden_size))
        if self.shared_experts is not None:
            self.shared_experts.build((None, c.hidden_size))
        hidden, inner = c.hidden_size, c.moe_intermediate_size
        self.gate_up_proj = self._add_experts("gate_up_proj", hidden, 2 * inner)
        self.down_proj = self._add_experts("down_proj", inner, hidden)

    def _add_experts(self, name: str, inputs: int, outputs: int) -> keras.Variable:
        """Create the stack of this rank's matrices, `[E, inputs, outputs]` where it has all."""
        drawn = keras.initializers.RandomNormal(stddev=self.config.initializer_range)
        experts, shape = self.config.n_routed_experts, (inputs, outputs)
        first = self.first_expert

        def share_of_all(shape: tuple[int, ...], dtype: Any = None) -> tf.Tensor:
            count = shape[0]
            return drawn((experts, *shape[1:]), dtype)[first : first + count]

        return self.add_weight(
            name=name,
            shape=(self.experts_here, *shape),
            initializer=drawn if self._ranks is None else share_of_all,
            autocast=False,  # read in their own type
        )

    @property
    def experts_here(self) -> int:
        """How many routed experts this layer holds: all, or its rank's share, copies included."""
        held = self.config.n_routed_experts if self._copies is None else len(self._copies.held)
        return held // (self._ranks.size if self._ranks else 1)

    @property
    def first_expert(self) -> int:
        """The first of them, counted over all ranks, copies included."""
        return self.experts_here * self._ranks.index if self._ranks else 0

    def call(self, x: tf.Tensor, token_mask: tf.Tensor | None = None) -> tuple[tf.Tensor, Routing]:
        """Route, run, sum.

        Args:
            x: `[B, S, hidden_size]`.
            token_mask: `[B, S]`, nonzero for real tokens; affects `Routing.load` alone.

        Returns:
            `[B, S, hidden_size]` and the routing of the `B * S` tokens.
        """
        x_TD = tf.reshape(x, [-1, self.config.hidden_size])
        mask_T = None if token_mask is None else tf.reshape(token_mask, [-1])
        routing = self.gate(x_TD, mask_T)
        if self._ranks is None:
            y = self._run(x_TD, routing.indices, routing.gates)
        else:
            chosen = routing.indices
            if self._copies is not None:
                chosen = self._copies.chosen(chosen, self._ranks.index)
            y = run_on_ranks(
                x_TD,
                chosen,
                routing.gates,
                self.experts_here,
                self._ranks,
                lambda x, expert, gate: self._run(x, expert[:, None], gate[:, None]),
                fp8_recipe(self.dtype_policy),
            )
        y = tf.reshape(y, tf.shape(x))
        if self.shared_experts is not None:
            y += self.shared_experts(x)
        return tf.ensure_shape(y, x.shape), routing

    def recomputed(
        self,
        h: tf.Tensor,
        norm: Callable[[tf.Tensor], tf.Tensor],
        token_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, Routing]:
        """Return `self(norm(h), token_mask)`, and don't hold what the norm gave: it is made again.

        So are the router's scores. Where experts are not one compiled operation, they would have to
        run again as well; then nothing does.

        Args:
            h: `[B, S, hidden_size]`.
            norm: what it passes first.
            token_mask: as for `call`.
        """
        shared = self.shared_experts
        plain = fp8_recipe(self.dtype_policy) is None and deferred_weight_gradients() is None
        whole = self._ranks is None and self.gate_up_proj is not None
        if not (plain and whole and use_kernels(h)):
            return self(norm(h), token_mask)
        mask_T = None if token_mask is None else tf.reshape(token_mask, [-1])

        def routed(h: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, Routing]:
            x = norm(h)
            x_TD = tf.reshape(x, [-1, self.config.hidden_size])
            return x, x_TD, self.gate(x_TD, mask_T)

        x, x_TD, first = routed(tf.stop_gradient(h))
        done = experts_done(x_TD, first.indices, first.gates, *self._experts())
        shared_done = None if shared is None else shared.done(x)

        @tf.recompute_grad
        def again(h: tf.Tensor) -> tuple[tf.Tensor, ...]:
            x, x_TD, routing = routed(h)
            gate_up, down = self._experts()
            y = run_experts(x_TD, routing.indices, routing.gates, gate_up, down, done)
            y = tf.reshape(y, tf.shape(x))
            if shared is not None:
                y += shared(x, done=shared_done)
            return tf.ensure_shape(y, h.shape), *routing

        y, *routing = again(h)
        return y, Routing(*routing)

    def _run(self, x: tf.Tensor, indices: tf.Tensor, gates: tf.Tensor) -> tf.Tensor:
        """Run rows through the experts that are here."""
        recipe = fp8_recipe(self.dtype_policy)
        gate_up, down = self._experts()
        if recipe is None or self.gate_up_proj is None:
            later = deferred_weight_gradients()
            if later is not None and self.gate_up_proj is not None:
                variables = self.gate_up_proj, self.down_proj
                return deferred_experts(x, indices, gates, *variables, later)
            return run_experts(x, indices, gates, gate_up, down)
        return fp8_experts(x, indices, gates, gate_up, down, recipe, self.path)

    def _experts(self) -> tuple[tf.Tensor | QuantizedWeights, ...]:
        if self.gate_up_proj is not None:
            return tf.convert_to_tensor(self.gate_up_proj), tf.convert_to_tensor(self.down_proj)
        return (
            QuantizedWeights(self.gate_up_proj_values, self.gate_up_proj_scales),
            QuantizedWeights(self.down_proj_values, self.down_proj_scales),
        )

    def quantize(self, mode: str = "int8", **_: Any) -> None:
        """Replace the routed experts by small weights, for inference; see `quantize_weights`.

        Args:
            mode: "int8", "int8_channel", "int4" or "fp8".
            **_: what else Keras hands over.

        Raises:
            ValueError: another mode; a width that is not a multiple of 32, but for "fp8".
        """
        check_mode(mode)
        for name in ("gate_up_proj", "down_proj"):
            if (weight := getattr(self, name)) is not None:
                self.put_quantized(name, quantize_weights(weight, mode))

    def put_quantized(self, name: str, weights: QuantizedWeights) -> None:
        """Replace one of the stacks by small weights that are there already.

        Args:
            name: "gate_up_proj" or "down_proj"; both are to be replaced before the next call.
            weights: of `[E, D, 2I]` or `[E, I, D]`.
        """
        values, scales = replace_weights(self, name, weights)
        setattr(self, f"{name}_values", values)
        setattr(self, f"{name}_scales", scales)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"config": self.config.to_dict()}
