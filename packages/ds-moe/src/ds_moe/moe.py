"""DeepSeekMoE: shared experts for every token, routed ones for some (arXiv 2412.19437, eq. 12).

Shape letters: B batch, S sequence, T tokens, D hidden_size, I moe_intermediate_size, E experts.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from ds_moe.config import MoEConfig
from ds_moe.experts import run_experts
from ds_moe.fp8_experts import fp8_experts
from ds_moe.router import Router, Routing
from ds_moe.swiglu import SwiGLU
from ds_precision import (
    QuantizedWeights,
    RestoresPolicy,
    check_mode,
    fp8_recipe,
    quantize_weights,
    replace_weights,
    takes_any_mode,
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
        normal = keras.initializers.RandomNormal
        self.gate_up_proj = self.add_weight(
            name="gate_up_proj",
            shape=(c.n_routed_experts, c.hidden_size, 2 * c.moe_intermediate_size),
            initializer=normal(stddev=c.initializer_range),
            autocast=False,  # read in their own type
        )
        self.down_proj = self.add_weight(
            name="down_proj",
            shape=(c.n_routed_experts, c.moe_intermediate_size, c.hidden_size),
            initializer=normal(stddev=c.initializer_range),
            autocast=False,  # read in their own type
        )

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
        recipe = fp8_recipe(self.dtype_policy)
        gate_up, down = self._experts()
        if recipe is None or self.gate_up_proj is None:
            y = run_experts(x_TD, routing.indices, routing.gates, gate_up, down)
        else:
            y = fp8_experts(x_TD, routing.indices, routing.gates, gate_up, down, recipe, self.path)
        y = tf.reshape(y, tf.shape(x))
        if self.shared_experts is not None:
            y += self.shared_experts(x)
        return tf.ensure_shape(y, x.shape), routing

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
