"""What rounding to 8 bits does to a run, looked at every so many steps.

A look is one more forward and backward pass of the first micro-batch, without an update, in which
every operand that is rounded is measured. Nothing of it reaches the run.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import tensorflow as tf

from ds_model import CausalLM
from ds_precision import BlockScaled, Format, watch_fp8
from ds_train.losses import pretraining_loss


@dataclass(frozen=True)
class OperandStats:
    """One operand of the FP8 products, as a whole matrix.

    Attributes:
        amax: Largest magnitude.
        underflow: Share of the numbers other than zero that became zero.
        subnormal: Share of them that became subnormal, where precision fades.
        overflow: Share of them beyond the format's largest number once scaled; scales that follow
            the data keep it at 0.
        smallest_scale: Over its tiles or blocks.
        largest_scale: The same.
        drift: Binary logarithm of the largest scale now over that of the last look; 0 at first.
    """

    amax: float
    underflow: float
    subnormal: float
    overflow: float
    smallest_scale: float
    largest_scale: float
    drift: float


@dataclass(frozen=True)
class StabilityMetrics:
    """One look.

    Attributes:
        step: The optimizer step that follows, from 1.
        operands: By name, as in `block_0/self_attn/o_proj/input`; empty without FP8.
        gradient_norms: Of each variable's gradient, by path, before clipping.
    """

    step: int
    operands: dict[str, OperandStats]
    gradient_norms: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON types, numbers to four digits."""
        shorter = {
            name: {key: _short(value) for key, value in asdict(stats).items()}
            for name, stats in self.operands.items()
        }
        norms = {name: _short(value) for name, value in self.gradient_norms.items()}
        return {"step": self.step, "operands": shorter, "gradient_norms": norms}


class _Seen(NamedTuple):
    amax: tf.Tensor
    underflow: tf.Tensor
    subnormal: tf.Tensor
    overflow: tf.Tensor
    smallest_scale: tf.Tensor
    largest_scale: tf.Tensor


class StabilityProbe:
    """Looks at a model in training.

    Args:
        model: Its variables are read, never changed.
        mtp_weight: Of the multi-token losses.
        balance_alpha: Of the balance loss.
    """

    def __init__(self, model: CausalLM, mtp_weight: float, balance_alpha: float) -> None:
        self._model = model
        self._weights = mtp_weight, balance_alpha
        self._last: dict[str, float] = {}
        self._look = tf.function(self._observe, autograph=False)

    def look(self, step: int, tokens: tf.Tensor) -> StabilityMetrics:
        """Does one look.

        Args:
            step: The step that follows.
            tokens: `[B, S + 1]` int32.
        """
        seen, norms = self._look(tokens)
        operands = {}
        for name, found in sorted(seen.items()):
            values = {key: float(value) for key, value in found._asdict().items()}
            largest = values["largest_scale"]
            before = self._last.get(name, largest)
            drift = math.log2(largest / before) if before > 0 and largest > 0 else 0.0
            self._last[name] = largest
            operands[name] = OperandStats(**values, drift=drift)
        return StabilityMetrics(step, operands, {name: float(n) for name, n in norms.items()})

    def _observe(self, tokens_BS: tf.Tensor) -> tuple[dict[str, _Seen], dict[str, tf.Tensor]]:
        seen: dict[str, _Seen] = {}
        prefix = f"{self._model.name}/"

        def note(name: str, x: tf.Tensor, small: BlockScaled, fmt: Format) -> None:
            seen[name.removeprefix(prefix)] = _stats(x, small, fmt)

        variables = self._model.trainable_variables
        with watch_fp8(note):
            with tf.GradientTape() as tape:
                output = self._model.forward(
                    tokens_BS[:, :-1], training=True, mtp=bool(self._model.mtp)
                )
                loss, _ = pretraining_loss(output, tokens_BS, *self._weights)
            gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        norms = {
            v.path.split("/", 1)[1]: tf.linalg.global_norm([tf.convert_to_tensor(g)])
            for v, g in zip(variables, gradients, strict=True)
        }
        return seen, norms


def _stats(x: tf.Tensor, small: BlockScaled, fmt: Format) -> _Seen:
    values = tf.abs(tf.cast(small.values, tf.float32))
    there = tf.cast(x != 0.0, tf.float32)
    count = tf.maximum(tf.reduce_sum(there), 1.0)

    def share(which: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(which, tf.float32) * there) / count

    # A scaled number that is a rounding above the largest is not one that did not fit.
    widest = fmt.max * (1.0 + fmt.worst_relative_error)
    return _Seen(
        amax=tf.reduce_max(tf.abs(x)),
        underflow=share(values == 0.0),
        subnormal=share((values > 0.0) & (values < fmt.smallest_normal)),
        overflow=share(tf.abs(x) > widest * small.spread_scales()),
        smallest_scale=tf.reduce_min(small.scales),
        largest_scale=tf.reduce_max(small.scales),
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")
