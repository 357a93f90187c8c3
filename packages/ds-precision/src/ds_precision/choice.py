"""Whether a compiled operation or TensorFlow's own runs where code is being traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.ops import control_flow_util

from ds_precision.kernels import kernels

TYPES = (tf.float32, tf.bfloat16)
_stock: ContextVar[bool] = ContextVar("stock", default=False)


def use_kernels(*tensors: tf.Tensor) -> bool:
    """Say whether the compiled products serve these operands where this is traced.

    They do for float32 and bfloat16 on a CPU, outside XLA, where they could be compiled and the
    processor has AVX-512 (or `DS_PRECISION_KERNELS=on`).

    Args:
        tensors: of any shape.
    """
    return (
        all(tensor.dtype in TYPES for tensor in tensors)
        and not _stock.get()
        and not traced_for_xla()
        and kernels() is not None
    )


@contextmanager
def stock_operations() -> Iterator[None]:
    """Trace what follows with TensorFlow's own operations alone: for graphs that leave here."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def traced_for_xla() -> bool:
    """Say whether the code that calls this is being traced for `jit_compile=True`."""
    # TensorFlow has no public way to ask this; `tf.function(jit_compile=True)` traces inside
    # an XLA control-flow context (OptionalXlaContext in polymorphic_function.py).
    return control_flow_util.GraphOrParentsInXlaContext(ops.get_default_graph())
