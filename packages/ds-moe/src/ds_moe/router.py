"""Which experts a token goes to (arXiv 2412.19437, section 2.1.2, eq. 12-16).

The router is float32 whatever the policy: a rounded score changes the choice.

Shape letters: T tokens, D hidden_size, E experts, K experts a token, G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from ds_moe.config import MoEConfig
from ds_precision import fused_routing, matmul, use_kernels


class Routing(NamedTuple):
    """What the router decided; everything about balance is computed from it.

    Attributes:
        indices: `[T, K]` int32: the chosen experts, in no particular order.
        gates: `[T, K]` float32: their weights in the output.
        scores: `[T, E]` float32: every expert's affinity, without the bias.
        load: `[E]` float32: tokens that each expert got; padding is not counted.
    """

    indices: tf.Tensor
    gates: tf.Tensor
    scores: tf.Tensor
    load: tf.Tensor


@keras.saving.register_keras_serializable(package="ds_moe")
class Router(keras.layers.Layer):
    """Scores experts, limits a token to its best groups, takes the top K.

    Args:
        config: sizes and rules; a mapping of `MoEConfig`'s fields is accepted too.
        **kwargs: of `keras.layers.Layer`; the dtype policy is float32 whatever is asked for.
    """

    def __init__(self, config: MoEConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.config = config if isinstance(config, MoEConfig) else MoEConfig(**config)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create `weight [D, E]` and, for V3's rule, `e_score_correction_bias [E]`."""
        self.weight = self.add_weight(
            name="weight",
            shape=(input_shape[-1], self.config.n_routed_experts),
            initializer=keras.initializers.RandomNormal(stddev=self.config.initializer_range),
        )
        self.e_score_correction_bias = None
        if self.config.has_router_bias:
            self.e_score_correction_bias = self.add_weight(
                name="e_score_correction_bias",
                shape=(self.config.n_routed_experts,),
                initializer="zeros",
                trainable=False,
                # Every replica computes the same new value from the summed loads.
                aggregation="only_first_replica",
            )

    def call(self, x: tf.Tensor, token_mask: tf.Tensor | None = None) -> Routing:
        """Route every token.

        Args:
            x: `[T, D]`.
            token_mask: `[T]`, nonzero for real tokens; padding is routed but not counted.
        """
        logits = matmul(x, self.weight)
        softmax = self.config.scoring_func == "softmax"
        scores = tf.nn.softmax(logits) if softmax else tf.sigmoid(logits)
        if use_kernels(scores):
            indices, gates = self._choose_and_weigh(scores)
        else:
            indices = self._choose(tf.stop_gradient(scores))
            gates = self._gates(scores, indices)
        return Routing(indices, gates, scores, self._load(indices, token_mask))

    def _choose_and_weigh(self, scores_TE: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Do as `_choose` and `_gates`, by one compiled operation."""
        c, bias = self.config, self.e_score_correction_bias
        return fused_routing(
            scores_TE,
            None if bias is None else tf.convert_to_tensor(bias),
            chosen=c.num_experts_per_tok,
            groups=1 if c.topk_method == "greedy" else c.n_group,
            best_groups=1 if c.topk_method == "greedy" else c.topk_group,
            two_best=c.topk_method == "noaux_tc",
            normalize=c.norm_topk_prob,
            factor=c.routed_scaling_factor,
        )

    def _choose(self, scores_TE: tf.Tensor) -> tf.Tensor:
        """Take the top K of the biased scores within the best groups."""
        c = self.config
        choice = scores_TE
        if self.e_score_correction_bias is not None:
            choice += tf.convert_to_tensor(self.e_score_correction_bias)
        if c.topk_method != "greedy" and c.topk_group < c.n_group:
            choice = self._limit_groups(choice)
        return tf.math.top_k(choice, c.num_experts_per_tok, sorted=False).indices

    def _limit_groups(self, choice_TE: tf.Tensor) -> tf.Tensor:
        """Put the experts of all but the best `topk_group` groups out of reach."""
        c = self.config
        choice_TGM = tf.reshape(choice_TE, [-1, c.n_group, c.experts_per_group])
        if c.topk_method == "noaux_tc":
            group_TG = tf.reduce_sum(tf.math.top_k(choice_TGM, 2, sorted=False).values, axis=-1)
        else:
            group_TG = tf.reduce_max(choice_TGM, axis=-1)
        best = tf.math.top_k(group_TG, c.topk_group, sorted=False).indices
        kept_TG = tf.reduce_any(tf.one_hot(best, c.n_group, True, False, dtype=tf.bool), axis=1)
        limited = tf.where(
            kept_TG[..., None], choice_TGM, tf.constant(float("-inf"), choice_TE.dtype)
        )
        return tf.reshape(limited, tf.shape(choice_TE))

    def _gates(self, scores_TE: tf.Tensor, indices_TK: tf.Tensor) -> tf.Tensor:
        """Weigh the chosen by their unbiased scores (eq. 13-14)."""
        gates = tf.gather(scores_TE, indices_TK, batch_dims=1)
        if self.config.norm_topk_prob:
            gates /= tf.reduce_sum(gates, axis=-1, keepdims=True) + 1e-20
        return gates * self.config.routed_scaling_factor

    def _load(self, indices_TK: tf.Tensor, token_mask: tf.Tensor | None) -> tf.Tensor:
        counted = tf.ones_like(indices_TK, tf.float32)
        if token_mask is not None:
            counted *= tf.cast(tf.cast(token_mask, tf.bool), tf.float32)[:, None]
        return tf.math.unsorted_segment_sum(
            tf.reshape(counted, [-1]), tf.reshape(indices_TK, [-1]), self.config.n_routed_experts
        )

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal layer."""
        return super().get_config() | {"config": self.config.to_dict()}
