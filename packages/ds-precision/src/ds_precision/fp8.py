"""FP8 training: the three products of every weight on small operands (arXiv 2412.19437, 3.3).

    forward            y  = Q(x, 1x128)    Q(W, 128x128)
    input's gradient   dx = Q(dy, 1x128)   Q(W, 128x128)^T
    weight's gradient  dW = Q(x, 128x1)^T  Q(dy, 128x1)

`Q` scales each tile or block by its largest magnitude and rounds to E4M3. Between the passes the
input is kept in its 8 bits, and tiled anew for the weight's gradient. Sums are float32; weights
and their gradients stay float32 outside.

The arithmetic is that of FP8 hardware, done on operands that are read back from 8 bits into
float32 (into bfloat16 where scales are powers of two: that is exact too, and faster). So training
behaves as it would there; it is not faster here. Compiled by XLA for a GPU, products take the form
that XLA makes FP8 products of (`Fp8Recipe.product`).

Shape letters: T rows (tokens), K inner, N outer size of a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import keras
import tensorflow as tf

from ds_precision.block_scaling import WHOLE, BlockScaled, dequantize_blocks, quantize_blocks
from ds_precision.choice import traced_for_xla
from ds_precision.formats import E4M3, E5M2, E5M6, Format
from ds_precision.products import multiply, multiply_outer, multiply_transposed

FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2, E5M6)}
_EIGHT_BITS = (E4M3.dtype, E5M2.dtype)
_SUM_STEP = 32  # numbers of the inner size that a tensor core adds at once


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """How operands are scaled and rounded, and how products are summed.

    The defaults are the paper's. The other values are what it argues against, to compare with.

    Attributes:
        tile: length of an activation's tile, and side of a weight's block.
        scaling: "block" by tile and block; "tensor" with one scale a matrix.
        gradient_format: of what comes back from the layer above: "E4M3" or "E5M2".
        power_of_two: round all scales up to powers of two, as V3.1 does. (The input of an
            attention's output projection, in E5M6, has such scales in any case.)
        accumulator_bits: bits that a running sum keeps, the leading one counted; 0 is float32.
            Emulated: 32 products are summed in float32, added to the sum, and what does not fit
            is cut off. The paper reports about 14 for the tensor cores of the H800.
        promote_every: after how many numbers of the inner size such a sum is moved to a float32
            one; 0 is never.

    Raises:
        ValueError: a field is out of range; names it.
    """

    tile: int = 128
    scaling: Literal["block", "tensor"] = "block"
    gradient_format: Literal["E4M3", "E5M2"] = "E4M3"
    power_of_two: bool = False
    accumulator_bits: int = 0
    promote_every: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        if self.tile < 1:
            raise ValueError(f"tile is {self.tile}; it must be 1 or more (128 in the paper)")
        if self.scaling not in ("block", "tensor"):
            raise ValueError(f"scaling is {self.scaling!r}; it must be 'block' or 'tensor'")
        if self.gradient_format not in ("E4M3", "E5M2"):
            raise ValueError(
                f"gradient_format is {self.gradient_format!r}; it must be 'E4M3' or 'E5M2'"
            )
        if not (self.accumulator_bits == 0 or 2 <= self.accumulator_bits <= 24):
            raise ValueError(
                f"accumulator_bits is {self.accumulator_bits}; it must be 0 (float32) or 2 to 24"
            )
        if self.promote_every < 0 or self.promote_every % _SUM_STEP:
            raise ValueError(
                f"promote_every is {self.promote_every}; it must be a multiple of {_SUM_STEP}, "
                "or 0 (never)"
            )

    @property
    def gradients(self) -> Format:
        """The format of what comes back."""
        return FORMATS[self.gradient_format]

    def rows(self, x: tf.Tensor, fmt: Format = E4M3, seen_as: str = "") -> BlockScaled:
        """Scale along each row: activations `[..., T, K]` in tiles of 1 x `tile`."""
        return self._small(x, (1, self.tile), fmt, seen_as)

    def columns(self, x: tf.Tensor, fmt: Format = E4M3, seen_as: str = "") -> BlockScaled:
        """Scale along each column: activations `[..., T, K]` in tiles of `tile` x 1."""
        return self._small(x, (self.tile, 1), fmt, seen_as)

    def blocks(self, weight: tf.Tensor, seen_as: str = "") -> BlockScaled:
        """Scale a weight `[..., K, N]` in square blocks."""
        return self._small(weight, (self.tile, self.tile), E4M3, seen_as)

    def read(self, small: BlockScaled, dtype: tf.DType) -> tf.Tensor:
        """Return an operand, `[..., R, C]`, of a product whose result is to be of `dtype`."""
        return dequantize_blocks(small, self._read_as(dtype))

    def product(
        self,
        a: BlockScaled,
        b: BlockScaled,
        dtype: tf.DType,
        transpose_a: bool = False,
        transpose_b: bool = False,
    ) -> tf.Tensor:
        """Return `a b` of matrices, or under XLA of stacks of them, one by one.

        The numbers are multiplied as they are where `multiplies_bits` says so, else as `read`.

        Args:
            a: `[..., T, K]`; `[..., K, T]` if `transpose_a`, with tiles along K.
            b: `[..., K, N]`, with the same tiles of K; `[..., N, K]` if `transpose_b`.
            dtype: of the layer's result, as for `read`.
            transpose_a: turn `a` first: a weight's gradient, always in float32. Not with
                `transpose_b`.
            transpose_b: turn `b` first: an input's gradient.

        Returns:
            `[..., T, N]`, float32 or what `read` returns.
        """
        if self.multiplies_bits(a, b):
            a, b = _turned(a) if transpose_a else a, _turned(b) if transpose_b else b
            y = eight_bit_product(a, b)
            return y if transpose_a else tf.cast(y, self._read_as(dtype))
        left, right = self.read(a, dtype), self.read(b, dtype)
        if transpose_a:
            return self.outer(left, right)
        return self.times_transposed(left, right) if transpose_b else self.times(left, right)

    def multiplies_bits(self, *operands: BlockScaled) -> bool:
        """Say whether numbers are multiplied in 8 bits: under XLA, on a GPU, sums in float32.

        Args:
            operands: of any shape.
        """
        return (
            all(small.values.dtype in _EIGHT_BITS for small in operands)
            and not self.accumulator_bits
            and traced_for_xla()
            and bool(tf.config.list_physical_devices("GPU"))
        )

    def times(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Return `a b`, `[T, K] [K, N]`; under XLA of stacks too, as the next two."""
        return self._summed(a, b) if self.accumulator_bits else multiply(a, b)

    def times_transposed(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Return `a b^T`, `[T, N] [K, N]`."""
        if self.accumulator_bits:
            return self._summed(a, tf.linalg.matrix_transpose(b))
        return multiply_transposed(a, b)

    def outer(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Return `a^T b`, `[T, K] [T, N]`, in float32."""
        if self.accumulator_bits:
            return self._summed(tf.linalg.matrix_transpose(a), b)
        return multiply_outer(a, b)

    def _read_as(self, dtype: tf.DType) -> tf.DType:
        exact = self.power_of_two and dtype == tf.bfloat16
        return tf.bfloat16 if exact else tf.float32

    def _small(
        self, x: tf.Tensor, block: tuple[int, int], fmt: Format, seen_as: str
    ) -> BlockScaled:
        block = WHOLE if self.scaling == "tensor" else block
        found = quantize_blocks(x, block, fmt, self.power_of_two or fmt is E5M6)
        if seen_as and _OBSERVERS:
            _OBSERVERS[-1](seen_as, tf.cast(x, tf.float32), found, fmt)
        return found

    def _summed(self, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Multiply with the narrow running sum."""
        a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
        missing, others = -tf.shape(a)[-1] % _SUM_STEP, [[0, 0]] * (a.shape.rank - 1)
        a = tf.pad(a, [*others, [0, missing]])
        b = tf.pad(b, [*others[1:], [0, missing], [0, 0]])
        steps = tf.shape(a)[-1] // _SUM_STEP
        every = self.promote_every // _SUM_STEP
        mask = tf.constant(-(1 << (24 - self.accumulator_bits)), tf.int32)
        zeros = tf.zeros(tf.concat([tf.shape(a)[:-1], tf.shape(b)[-1:]], axis=0))

        def add(
            i: tf.Tensor, total: tf.Tensor, part: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            at = slice(i * _SUM_STEP, (i + 1) * _SUM_STEP)
            part += tf.matmul(a[..., at], b[..., at, :])
            part = tf.bitcast(tf.bitcast(part, tf.int32) & mask, tf.float32)
            if every:
                full = (i + 1) % every == 0
                total, part = tf.where(full, total + part, total), tf.where(full, 0.0, part)
            return i + 1, total, part

        _, total, part = tf.while_loop(
            lambda i, *_: i < steps, add, (tf.constant(0), zeros, zeros), parallel_iterations=1
        )
        return total + part


@keras.saving.register_keras_serializable(package="ds_precision")
class Fp8Policy(keras.dtype_policies.DTypePolicy):
    """A Keras dtype policy: layers of this project multiply their weights as FP8 training does.

    Variables and what flows between layers have the types of `source`. Embedding, head, router,
    norms and the core of attention compute in those alone, as in the paper.

    Args:
        source: "mixed_bfloat16" as the paper trains, or "float32" to study the rounding alone.
        recipe: how operands are rounded; the mapping that `get_config` returns is accepted too.

    Raises:
        ValueError: another source; a field of the recipe is out of range.
    """

    def __init__(
        self,
        source: str = "mixed_bfloat16",
        recipe: Fp8Recipe | Mapping[str, Any] | None = None,
    ) -> None:
        if source not in ("mixed_bfloat16", "float32"):
            raise ValueError(f"source is {source!r}; it must be 'mixed_bfloat16' or 'float32'")
        super().__init__(source)
        self.source = source
        self.recipe = recipe if isinstance(recipe, Fp8Recipe) else Fp8Recipe(**(recipe or {}))
        self._name = f"fp8_from_{source}"

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal policy."""
        return {"source": self.source, "recipe": dataclasses.asdict(self.recipe)}

    def __eq__(self, other: object) -> bool:
        """Say whether layers would compute the same."""
        return isinstance(other, Fp8Policy) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        """Agree with `==`."""
        return hash((self.source, self.recipe))


class RestoresPolicy:
    """Before `keras.layers.Layer` in a layer's bases: `from_config` brings back an `Fp8Policy`.

    Keras' own restores a policy by its name alone, unless it has one of Keras' quantization modes,
    which would send calls to Keras' quantized layers.
    """

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Make an equal layer of what `get_config` returned."""
        dtype = config.get("dtype")
        if isinstance(dtype, dict):
            config = config | {"dtype": keras.dtype_policies.deserialize(dtype)}
        # The layer's own, which stands after this class.
        return super().from_config(config)  # type: ignore[misc]


def fp8_recipe(policy: keras.dtype_policies.DTypePolicy) -> Fp8Recipe | None:
    """Return the recipe of a layer's `dtype_policy`, or `None` where it has none."""
    return policy.recipe if isinstance(policy, Fp8Policy) else None


def without_fp8(policy: keras.dtype_policies.DTypePolicy) -> keras.dtype_policies.DTypePolicy:
    """Return the policy for what stays in higher precision: the source's own."""
    return keras.dtype_policies.get(policy.source) if isinstance(policy, Fp8Policy) else policy


def eight_bit_product(a: BlockScaled, b: BlockScaled) -> tf.Tensor:
    """Return `a b` from numbers of 8 bits, tile by tile of the inner size; of stacks one by one.

    `sum_k (A_k B_k) * s_k t_k`: each product is one of E4M3 or E5M2 numbers alone, summed in
    float32, and takes its scales afterwards. XLA makes an FP8 product of each on a GPU that has
    them; elsewhere it is the same sum, and slow.

    Args:
        a: `[..., T, K]` with scales a row (or rows) and tile of K.
        b: `[..., K, N]` with scales a tile of K and column (or columns); the same tiles of K.

    Returns:
        `[..., T, N]` float32.

    Raises:
        ValueError: the tiles differ.
    """
    inner = a.values.shape[-1]
    tile, other = (min(inner, side) for side in (a.block[1], b.block[0]))
    if tile != other:
        raise ValueError(f"a has tiles of {tile} along the inner size, b of {other}")
    rows = tf.range(tf.shape(a.values)[-2]) // a.block[0]
    columns = tf.range(tf.shape(b.values)[-1]) // b.block[1]
    total = tf.zeros([])
    for k, first in enumerate(range(0, inner, tile)):
        at = slice(first, min(first + tile, inner))
        left, right = (tf.cast(v, tf.float32) for v in (a.values[..., at], b.values[..., at, :]))
        by_row = tf.gather(a.scales[..., k], rows, axis=-1)[..., None]
        by_column = tf.gather(b.scales[..., k, :], columns, axis=-1)[..., None, :]
        total += tf.matmul(left, right) * by_row * by_column
    return total


def _turned(small: BlockScaled) -> BlockScaled:
    values, scales = (tf.linalg.matrix_transpose(part) for part in (small.values, small.scales))
    return BlockScaled(values, scales, (small.block[1], small.block[0]))


def fp8_matmul(
    x: tf.Tensor,
    kernel: Any,
    recipe: Fp8Recipe | None = None,
    input_format: Format = E4M3,
    name: str = "",
) -> tf.Tensor:
    """Multiply the last axis of `x` by a weight, forward and backward in 8 bits.

    Args:
        x: `[..., K]`, float32 or bfloat16.
        kernel: `[K, N]`, tensor or variable of a float type.
        recipe: how; the paper's if `None`.
        input_format: of `x`, in both products that it takes part in.
        name: what `watch_fp8` calls the three operands: `name/input`, `/weight`, `/gradient`.

    Returns:
        `[..., N]` in the type of `x`. Gradients: of `x` in its type, of the kernel in float32,
        cast to the kernel's type.
    """
    how = recipe or Fp8Recipe()

    @tf.custom_gradient
    def product(
        x: tf.Tensor, kernel: tf.Tensor
    ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
        inner, outer = kernel.shape
        small_x = how.rows(tf.reshape(x, [-1, inner]), input_format, _part(name, "input"))
        small_w = how.blocks(kernel, _part(name, "weight"))
        y_TN = how.product(small_x, small_w, x.dtype)
        y = tf.reshape(tf.cast(y_TN, x.dtype), tf.concat([tf.shape(x)[:-1], [outer]], 0))

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            dy_TN = tf.reshape(dy, [-1, outer])
            small_dy = how.rows(dy_TN, how.gradients, _part(name, "gradient"))
            tall_x = how.columns(how.read(small_x, x.dtype), input_format)
            tall_dy = how.columns(dy_TN, how.gradients)
            dx = how.product(small_dy, small_w, x.dtype, transpose_b=True)
            dw = how.product(tall_x, tall_dy, x.dtype, transpose_a=True)
            return tf.reshape(tf.cast(dx, x.dtype), tf.shape(x)), tf.cast(dw, kernel.dtype)

        return y, gradient

    kernel = tf.convert_to_tensor(kernel)
    return tf.ensure_shape(product(x, kernel), [*x.shape[:-1], kernel.shape[-1]])


Observer = Callable[[str, tf.Tensor, BlockScaled, Format], None]
_OBSERVERS: list[Observer] = []


@contextmanager
def watch_fp8(observer: Observer) -> Iterator[None]:
    """Call `observer` for every operand that is rounded while this lasts, the innermost alone.

    In a graph that is while it is traced, backward pass included: what the observer makes of the
    tensors it is shown can be returned from the function.

    Args:
        observer: gets the operand's name, the operand `[..., R, C]` float32, what became of it,
            and the format.
    """
    _OBSERVERS.append(observer)
    try:
        yield
    finally:
        _OBSERVERS.pop()


def _part(name: str, part: str) -> str:
    return f"{name}/{part}" if name else ""
