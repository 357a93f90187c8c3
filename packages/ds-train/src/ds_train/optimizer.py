"""AdamW as DeepSeek-V3 trains with it (arXiv 2412.19437, section 4.2), as torch computes it.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr wd p                  (decoupled; matrices only)
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Keras' own AdamW adds epsilon to the uncorrected `sqrt(v)`; torch adds it after the bias
correction, which is what the published runs used. Multiplying the last fraction through by
`sqrt(1 - b2^t)` gives TensorFlow's fused `ResourceApplyAdam` with `eps * sqrt(1 - b2^t)`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf


class _Scalars(NamedTuple):
    rate: tf.Tensor
    epsilon: tf.Tensor
    decay: tf.Tensor
    beta_1: tf.Tensor
    beta_2: tf.Tensor
    zero: tf.Tensor


@keras.saving.register_keras_serializable(package="ds_train")
class AdamW(keras.optimizers.Optimizer):
    """AdamW with decoupled weight decay on matrices only; works in `fit` and in a loop.

    Decay rule: a variable decays when it has two or more dimensions (projections, embeddings,
    stacked experts, the router's weight). Norm weights and biases do not.

    Args:
        learning_rate: A float or a Keras schedule.
        beta_1: Decay of the first moment.
        beta_2: Decay of the second moment.
        epsilon: Added after the bias correction, as torch does.
        weight_decay: Fraction of the learning rate by which matrices shrink each step.
        name: Name of the optimizer.
        **options: What every `keras.optimizers.Optimizer` takes, `global_clipnorm` for one.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 2.2e-4,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
        name: str = "adamw",
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, name=name, **options
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the two moments of every variable, in the variable's shape and dtype."""
        if self.built:
            return
        super().build(variables)
        self.momentums, self.velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )

    def apply(
        self,
        grads: Sequence[tf.Tensor | tf.IndexedSlices | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Updates the variables; sparse gradients are summed into dense ones first.

        An embedding's gradient repeats a row's index once for each use of its token. Those
        repeats must be added before they are squared into the second moment.
        """
        dense = [None if g is None else tf.convert_to_tensor(g) for g in grads]
        super().apply(dense, trainable_variables)

    def _backend_update_step(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: tf.Tensor,
    ) -> None:
        # The scalars are the same for all variables: computed once, they keep the graph small.
        scalars = self._scalars(learning_rate, trainable_variables[0].dtype)
        super()._backend_update_step(grads, trainable_variables, scalars)

    def _scalars(self, learning_rate: tf.Tensor, dtype: str) -> _Scalars:
        # In float64: 1 - b2^t loses half of float32's digits while t is small.
        step = tf.cast(self.iterations + 1, tf.float64)
        rate = tf.cast(learning_rate, tf.float64)
        correction_1 = 1.0 - tf.pow(tf.constant(self.beta_1, tf.float64), step)
        root_2 = tf.sqrt(1.0 - tf.pow(tf.constant(self.beta_2, tf.float64), step))
        found = _Scalars(
            rate=rate * root_2 / correction_1,
            epsilon=self.epsilon * root_2,
            decay=rate * (self.weight_decay or 0.0),
            beta_1=tf.constant(self.beta_1, tf.float64),
            beta_2=tf.constant(self.beta_2, tf.float64),
            zero=tf.zeros([], tf.float64),
        )
        return _Scalars(*(tf.cast(value, dtype) for value in found))

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: _Scalars
    ) -> None:
        """Update one variable in place with TensorFlow's fused Adam kernel."""
        index = self._get_variable_index(variable)
        scalars = _Scalars(*(tf.cast(value, variable.dtype) for value in learning_rate))
        if self.weight_decay and self._use_weight_decay(variable):
            variable.assign_sub(variable * scalars.decay)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self.momentums[index].value.handle,
            v=self.velocities[index].value.handle,
            # Zero powers: the bias correction is already inside the rate.
            beta1_power=scalars.zero,
            beta2_power=scalars.zero,
            lr=scalars.rate,
            beta1=scalars.beta_1,
            beta2=scalars.beta_2,
            epsilon=scalars.epsilon,
            grad=tf.cast(gradient, variable.dtype),
        )

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        """Do nothing: `update_step` decays, where the scalars are."""

    def _use_weight_decay(self, variable: tf.Variable) -> bool:
        return len(variable.shape) >= 2 and super()._use_weight_decay(variable)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for Keras serialisation."""
        config = super().get_config()
        config.update(beta_1=self.beta_1, beta_2=self.beta_2, epsilon=self.epsilon)
        return config
