"""The compiled operations alone, beside the same sums in stock TensorFlow, in GFLOP/s."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from bench.found import Found
from bench.tasks import PRESET
from ds_model import ModelConfig
from ds_moe.experts import sorted_experts
from ds_precision import fused_experts, matmul

WARM_UP, TRIES = 2, 9
PRODUCTS = ((512, 512, 512), (4096, 512, 512), (4096, 512, 1536))  # rows, inner, columns
TOKENS = (512, 2048, 4096)
Run = Callable[[], Any]


def measure() -> list[dict[str, Any]]:
    """Return for each operation its name, precision, and the best of several tries of both."""
    found = []
    for precision in ("float32", "bfloat16"):
        dtype = tf.as_dtype(precision)
        for rows, inner, columns in PRODUCTS:
            x, w = _normal(dtype, rows, inner), _normal(dtype, inner, columns)
            both = {"ours": _compiled(matmul, x, w), "stock": _compiled(tf.matmul, x, w)}
            name = f"product {rows} x {inner} x {columns}"
            found.append(_row(name, precision, 2 * rows * inner * columns, both))
        for tokens in TOKENS:
            found += _experts(tokens, precision, dtype)
    return found


def kernels_table(found: Found) -> str:
    """Return the page's section."""
    if not found.kernels:
        return ""
    lines = [
        "## Operations alone",
        "",
        "GFLOP/s, the best of several tries: what the rows above are made of, and the same sums in",
        "stock TensorFlow. Experts are those of one layer, every expert with about as many tokens.",
        "",
        "| operation | precision | ours | stock TensorFlow | of the limit |",
        "|---|---|---|---|---|",
    ]
    for row in found.kernels.get("rows", []):
        limit = found.limits.get(f"gemm_{row['precision']}")
        share = f"{row['ours'] / limit:.0%}" if limit else "-"
        cells = (
            row["operation"],
            row["precision"],
            f"{row['ours']:.0f}",
            f"{row['stock']:.0f}",
            share,
        )
        lines.append(f"| {' | '.join(cells)} |")
    if "failed" in found.kernels:
        lines += ["", found.kernels["failed"]]
    return "\n".join(lines)


def _experts(tokens: int, precision: str, dtype: tf.DType) -> list[dict[str, Any]]:
    c = ModelConfig.preset(PRESET).moe
    if c is None:
        return []
    rng = np.random.default_rng(0)
    experts, chosen, inner = c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size
    picked = np.stack([rng.permutation(experts)[:chosen] for _ in range(tokens)]).astype(np.int32)
    given = [
        _normal(dtype, tokens, c.hidden_size),
        tf.constant(picked),
        tf.constant(rng.random((tokens, chosen)), tf.float32),
        _normal(dtype, experts, c.hidden_size, 2 * inner),
        _normal(dtype, experts, inner, c.hidden_size),
    ]

    def both_ways(run: Callable[..., tf.Tensor]) -> Callable[..., Any]:
        def step(*given: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([given[0], *given[2:]])
                y = run(*given)
            return tape.gradient(y, [given[0], *given[2:]])

        return step

    work = 2 * tokens * chosen * 3 * c.hidden_size * inner
    runs = {"ours": fused_experts, "stock": sorted_experts}
    forward = {name: _compiled(run, *given) for name, run in runs.items()}
    step = {name: _compiled(both_ways(run), *given) for name, run in runs.items()}
    return [
        _row(f"experts, {tokens} tokens", precision, work, forward),
        _row(f"experts, {tokens} tokens, with gradients", precision, 3 * work, step),
    ]


def _normal(dtype: tf.DType, *shape: int) -> tf.Tensor:
    return tf.cast(tf.random.normal(shape, stddev=0.05), dtype)


def _compiled(run: Callable[..., Any], *given: tf.Tensor) -> Run:
    function = tf.function(run, autograph=False)
    return lambda: function(*given)


def _row(name: str, precision: str, work: float, runs: dict[str, Run]) -> dict[str, Any]:
    """Time both in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for attempt in range(WARM_UP + TRIES):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            if attempt >= WARM_UP:
                best[key] = min(best[key], seconds)
    speeds = {key: round(work / seconds / 1e9, 1) for key, seconds in best.items()}
    return {"operation": name, "precision": precision, **speeds}
