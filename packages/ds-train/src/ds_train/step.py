"""One optimizer step as one compiled graph: micro-batches, clipping, AdamW, expert biases.

The forward pass changes no variable, so a step is: gradients and expert loads summed over
micro-batches and replicas, one update of the weights, then one update of the biases from the
summed loads.

Compiled with `tf.function`, not XLA: on CPU oneDNN's graph-mode kernels are faster, and the
experts' row counts are data. Not AutoGraph either: the control flow is explicit.

Shape letters: N micro-batches, B sequences of a micro-batch, S sequence, L expert layers,
E experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from ds_model import CausalLM
from ds_moe import MixtureOfExperts, update_biases
from ds_precision import fused_square_sum, use_kernels
from ds_train.config import TrainConfig
from ds_train.loss_scale import LossScale
from ds_train.losses import pretraining_loss
from ds_train.optimizer import AdamW


class StepOutput(NamedTuple):
    """What one optimizer step gives back.

    Attributes:
        scalars: `loss`, `cross_entropy`, `mtp_cross_entropy` (nats a token),
            `balance_loss`, `gradient_norm` (before clipping), `learning_rate`, `loss_scale`, and
            `applied` (0 where the step changed nothing); float32.
        loads: `[L, E]` float32: tokens that each expert got in this step.
    """

    scalars: dict[str, tf.Tensor]
    loads: tf.Tensor


class _Sums(NamedTuple):
    gradients: list[tf.Tensor]
    loads: list[tf.Tensor]
    scalars: dict[str, tf.Tensor]


class TrainStep:
    """The training step of a model under a configuration.

    Under a `tf.distribute` strategy make model, optimizer and step in its scope and call
    `replica_step` through `strategy.run`.

    Args:
        model: Whose trainable variables are trained.
        optimizer: Already carries the learning-rate schedule.
        config: Loss weights, clipping, accumulation.

    Attributes:
        scaling: What the loss is multiplied by, and whether steps are skipped.
    """

    def __init__(self, model: CausalLM, optimizer: AdamW, config: TrainConfig) -> None:
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._variables = list(model.trainable_variables)
        self.scaling = LossScale(config.train)
        if not optimizer.built:
            optimizer.build(self._variables)
        self.compiled = tf.function(self.replica_step, autograph=False)

    def replica_step(self, tokens_NBS: tf.Tensor) -> StepOutput:
        """Does one optimizer step on this replica's share of the batch.

        Args:
            tokens_NBS: `[N, B, S + 1]` int32, static shape.

        Returns:
            Losses are means over all replicas, loads are sums.

        Raises:
            ValueError: Steps may be skipped and there are several replicas: optimizers can't
                update inside a condition there.
        """
        sums = self._accumulate(tokens_NBS)
        count = tokens_NBS.shape[0]
        gradients = sums.gradients
        scalars = {name: value / count for name, value in sums.scalars.items()}
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        loads = sums.loads
        if replicas > 1:
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            scalars = context.all_reduce(tf.distribute.ReduceOp.MEAN, scalars)
        if replicas > 1 and self.scaling.skips:
            raise ValueError(
                f"[train] nonfinite is 'skip' or dtype_policy float16 with {replicas} replicas; "
                "one replica can skip steps"
            )
        # The optimizer scales the gradients as it reads them: no pass of its own for that.
        share = 1.0 / (count * replicas * tf.convert_to_tensor(self.scaling.value))
        scale, norm = clip_scale(gradients, self._config.optimizer.clip_norm, share)
        scalars["gradient_norm"] = norm
        scalars["learning_rate"] = tf.cast(self._optimizer.learning_rate, tf.float32)
        scalars["loss_scale"] = tf.identity(self.scaling.value)

        def update() -> None:
            step = tf.identity(self._optimizer.iterations)  # before the update counts one more
            # Keras' optimizer sums over replicas; these are already the same on all of them.
            self._optimizer.apply(gradients, scale=scale / replicas)
            balance(self._model.moe_layers, loads, self._config, step)

        finite = tf.math.is_finite(norm) & tf.math.is_finite(scalars["loss"])
        scalars["applied"] = self.scaling.guarded(finite, update)
        self.scaling.adjust(finite)
        if replicas > 1 and loads:
            loads = context.all_reduce(tf.distribute.ReduceOp.SUM, loads)
        return StepOutput(scalars, tf.stack(loads) if loads else tf.zeros([0, 0]))

    def _accumulate(self, tokens_NBS: tf.Tensor) -> _Sums:
        first = self._micro_batch(tokens_NBS[0])
        count = tokens_NBS.shape[0]
        if count == 1:
            return first

        def add(index: tf.Tensor, sums: _Sums) -> tuple[tf.Tensor, _Sums]:
            found = self._micro_batch(tokens_NBS[index])
            return index + 1, tf.nest.map_structure(tf.add, sums, found)

        # A loop in the graph: the model is traced twice, however many micro-batches.
        _, sums = tf.while_loop(
            lambda index, _: index < count,
            add,
            (tf.constant(1), first),
            parallel_iterations=1,
        )
        return sums

    def _micro_batch(self, tokens_BS: tf.Tensor) -> _Sums:
        table = self._config.loss
        with tf.GradientTape() as tape:
            output = self._model.forward(
                tokens_BS[:, :-1],
                training=True,
                mtp=bool(self._model.mtp),
                recompute=self._config.train.recompute,
            )
            loss, parts = pretraining_loss(
                output,
                tokens_BS,
                mtp_weight(self._config, self._optimizer.iterations),
                table.balance_alpha,
            )
            scaled = self.scaling.scaled(loss)
        gradients = tape.gradient(
            scaled, self._variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return _Sums(
            [tf.convert_to_tensor(g) for g in gradients],  # sum the embedding's repeated rows
            [routing.load for routing in output.routings],
            {"loss": loss, **parts},
        )


def mtp_weight(config: TrainConfig, iterations: tf.Tensor) -> tf.Tensor:
    """Returns lambda of eq. 25 (arXiv 2412.19437) after so many optimizer steps, a scalar."""
    table = config.loss
    late = tf.cast(iterations, tf.float32) >= table.mtp_late_from * config.train.steps
    return tf.where(late, table.mtp_weight_late, table.mtp_weight)


def balance(
    layers: Sequence[MixtureOfExperts],
    loads: Sequence[tf.Tensor],
    config: TrainConfig,
    iterations: tf.Tensor,
) -> None:
    """Moves the biases of expert layers' routers; one load `[E]` a layer, of the whole step."""
    table = config.loss
    if not loads or table.bias_update_speed == 0:
        return
    # The paper stops moving the biases for the last 500B of 14.8T tokens.
    moving = tf.cast(iterations, tf.float32) < table.bias_update_until * config.train.steps
    speed = tf.where(moving, table.bias_update_speed, 0.0)
    update_biases([layer.gate for layer in layers], loads, speed)  # sums over replicas itself


def clip_scale(
    gradients: Sequence[tf.Tensor], clip_norm: float, share: float | tf.Tensor = 1.0
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns what to multiply gradients by so that they are clipped as torch does it.

    Args:
        gradients: Of any shapes.
        clip_norm: Largest norm of all of them together.
        share: What they are to be multiplied by anyway, before clipping.

    Returns:
        `share * min(1, clip_norm / (norm + 1e-6))` and `norm`, that of `share * gradients`;
        float32 scalars.
    """
    found = tf.sqrt(square_sum(gradients))
    norm = share * found
    return share * clip_to(norm, clip_norm), norm


def clip_to(norm: tf.Tensor, clip_norm: float) -> tf.Tensor:
    """Return `min(1, clip_norm / (norm + 1e-6))`, what torch multiplies gradients by."""
    return tf.minimum(1.0, clip_norm / (norm + 1e-6))


def square_sum(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the sum of the squares of all numbers of tensors of any shapes, a float32 scalar."""
    if use_kernels(*tensors) and all(tensor.dtype == tf.float32 for tensor in tensors):
        return fused_square_sum(tensors)
    return tf.cast(tf.square(tf.linalg.global_norm(tensors)), tf.float32)
