"""AdamW as DeepSeek-V3 trains with it (arXiv 2412.19437, section 4.2), as torch computes it.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    p <- p - lr wd p                  (decoupled; matrices only)
    p <- p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Keras' own AdamW adds epsilon to the uncorrected `sqrt(v)`; torch adds it after the bias
correction, which is what the published runs used. Multiplying the last fraction through by
`sqrt(1 - b2^t)` gives TensorFlow's fused `ResourceApplyAdam` with `eps * sqrt(1 - b2^t)`.

On a CPU with a compiler one operation reads and writes each number once: scaling of the
gradient, decay and all. Elsewhere `ResourceApplyAdam` runs between stock operations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from ds_precision import fused_adamw, use_kernels


class _Scalars(NamedTuple):
    """What an update needs beside its tensors, `[6]`: see `fused_adamw`."""

    decaying: tf.Tensor
    constant: tf.Tensor  # the same with a decay of 0


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
        moments: What both moments are kept in: "float32" (the variable's type, if that is
            another), or "bfloat16" as in DeepSeek-V3's training; updates are computed in float32.
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
        moments: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__(
            learning_rate=learning_rate, weight_decay=weight_decay, name=name, **options
        )
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        if moments not in ("float32", "bfloat16"):
            raise ValueError(f"moments is {moments!r}; it must be 'float32' or 'bfloat16'")
        self.moments = moments
        self._scale: float | tf.Tensor = 1.0

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Creates the two moments of every variable, in the variable's shape."""
        if self.built:
            return
        super().build(variables)
        if self.moments == "float32":
            names = ["momentum", "velocity"]
            self.momentums, self.velocities = self.add_optimizer_variables(variables, names)
            return

        def small(variable: keras.Variable, name: str) -> keras.Variable:
            path = f"{variable.path.replace('/', '_')}_{name}"
            return self.add_variable(variable.shape, dtype="bfloat16", name=path)

        self.momentums = [small(variable, "momentum") for variable in variables]
        self.velocities = [small(variable, "velocity") for variable in variables]

    def apply(
        self,
        grads: Sequence[tf.Tensor | tf.IndexedSlices | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
        scale: float | tf.Tensor = 1.0,
    ) -> None:
        """Updates the variables; sparse gradients are summed into dense ones first.

        An embedding's gradient repeats a row's index once for each use of its token. Those
        repeats must be added before they are squared into the second moment.

        Args:
            grads: One a variable, each with the shape of it.
            trainable_variables: Those that the optimizer was built with, if not given.
            scale: What all gradients are multiplied by first, to clip them for example.
        """
        dense = [None if g is None else tf.convert_to_tensor(g) for g in grads]
        self._scale = scale
        super().apply(dense, trainable_variables)
        self._scale = 1.0

    def _backend_update_step(
        self,
        grads: Sequence[tf.Tensor],
        trainable_variables: Sequence[keras.Variable],
        learning_rate: tf.Tensor,
    ) -> None:
        self._updated: list[tf.Operation] = []
        scalars = self._scalars(learning_rate, trainable_variables[0].dtype)
        super()._backend_update_step(grads, trainable_variables, scalars)
        self._updated = []

    def _scalars(self, learning_rate: tf.Tensor, dtype: str) -> _Scalars:
        # In float64: 1 - b2^t loses half of float32's digits while t is small.
        step = tf.cast(self.iterations + 1, tf.float64)
        rate = tf.cast(learning_rate, tf.float64)
        correction_1 = 1.0 - tf.pow(tf.constant(self.beta_1, tf.float64), step)
        root_2 = tf.sqrt(1.0 - tf.pow(tf.constant(self.beta_2, tf.float64), step))
        scale = tf.cast(self._scale, tf.float64)
        decay = rate * (self.weight_decay or 0.0)
        first = [scale, rate * root_2 / correction_1, self.epsilon * root_2]
        betas = [self.beta_1, self.beta_2]
        found = tf.stack([*first, decay, *betas]), tf.stack([*first, 0.0, *betas])
        return _Scalars(*(tf.cast(scalars, dtype) for scalars in found))

    def update_step(
        self, gradient: tf.Tensor, variable: tf.Variable, learning_rate: _Scalars
    ) -> None:
        """Update one variable and its moments; the gradient has the shape of the variable."""
        index = self._get_variable_index(variable)
        moments = self.momentums[index].value.handle, self.velocities[index].value.handle
        decays = self.weight_decay and self._use_weight_decay(variable)
        scalars = learning_rate.decaying if decays else learning_rate.constant
        scalars = tf.cast(scalars, variable.dtype)
        gradient = tf.cast(gradient, variable.dtype)
        if variable.dtype == tf.float32 and use_kernels(gradient):
            self._update_fused(gradient, (variable.handle, *moments), scalars)
        elif self.moments == "bfloat16":
            self._update_small(gradient, variable, index, scalars, decays)
        else:
            if decays:
                variable.assign_sub(variable * scalars[3])
            _apply_adam(gradient, variable.handle, moments, scalars)

    def _update_fused(
        self, gradient: tf.Tensor, handles: tuple[tf.Tensor, ...], scalars: tf.Tensor
    ) -> None:
        # One variable after the other: each update makes new tensors, and the old ones should
        # be gone before the next does.
        with tf.control_dependencies(self._updated):
            kept = tf.as_dtype(self.moments)
            types = (tf.float32, kept, kept)
            old = [
                tf.cast(tf.raw_ops.ReadVariableOp(resource=handle, dtype=dtype), tf.float32)
                for handle, dtype in zip(handles, types, strict=True)
            ]
            for tensor in old:
                tensor.set_shape(gradient.shape)
            new = fused_adamw(old[0], old[1], old[2], gradient, scalars)
        writes = [
            tf.raw_ops.AssignVariableOp(resource=handle, value=tf.cast(value, dtype))
            for handle, value, dtype in zip(handles, new, types, strict=True)
        ]
        self._updated[:] = [write for write in writes if write is not None]  # none if eager

    def _update_small(
        self,
        gradient: tf.Tensor,
        variable: tf.Variable,
        index: int,
        scalars: tf.Tensor,
        decays: bool,
    ) -> None:
        """Update by stock operations where moments are bfloat16.

        `ResourceApplyAdam` has moments of the variable's type alone.
        """
        scale, rate, epsilon, decay, beta_1, beta_2 = tf.unstack(scalars)
        g = gradient * scale
        m, v = (tf.cast(kept[index].value, g.dtype) for kept in (self.momentums, self.velocities))
        m += (1.0 - beta_1) * (g - m)
        v += (1.0 - beta_2) * (g * g - v)
        shrunk = variable * (1.0 - decay) if decays else variable
        variable.assign(shrunk - rate * m / (tf.sqrt(v) + epsilon))
        self.momentums[index].assign(tf.cast(m, tf.bfloat16))
        self.velocities[index].assign(tf.cast(v, tf.bfloat16))

    def _apply_weight_decay(self, variables: Sequence[keras.Variable]) -> None:
        """Do nothing: `update_step` decays, where the scalars are."""

    def _use_weight_decay(self, variable: tf.Variable) -> bool:
        return len(variable.shape) >= 2 and super()._use_weight_decay(variable)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, for Keras serialisation."""
        config = super().get_config()
        config.update(beta_1=self.beta_1, beta_2=self.beta_2, epsilon=self.epsilon)
        config.update(moments=self.moments)
        return config


def _apply_adam(
    gradient: tf.Tensor, handle: tf.Tensor, moments: tuple[tf.Tensor, tf.Tensor], scalars: tf.Tensor
) -> None:
    """Updates a variable that has decayed already, in place by a stock operation."""
    scale, rate, epsilon, _, beta_1, beta_2 = tf.unstack(scalars)
    tf.raw_ops.ResourceApplyAdam(
        var=handle,
        m=moments[0],
        v=moments[1],
        # Zero powers: the bias correction is already inside the rate.
        beta1_power=tf.zeros_like(rate),
        beta2_power=tf.zeros_like(rate),
        lr=rate,
        beta1=beta_1,
        beta2=beta_2,
        epsilon=epsilon,
        grad=gradient * scale,
    )
