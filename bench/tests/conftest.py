"""A run's findings, as small as they can be."""

from __future__ import annotations

import pytest

from bench.found import Agreement, Found, Missing, Row, Speed
from bench.ratios import Spread
from bench.tasks import Task
from ds_model import ModelConfig


def speed(median, ratio=None, mode="batched"):
    return Speed(
        mode=mode,
        tried={mode: median},
        first_seconds=1.5,
        speed=Spread(median, median - 10, median + 10),
        ratio=None if ratio is None else Spread(ratio, ratio - 0.1, ratio + 0.1),
    )


@pytest.fixture(scope="session")
def config():
    return ModelConfig.preset("bench")


@pytest.fixture
def found():
    return Found(
        scope="full",
        date="2026-01-02",
        machine={"processor": "A chip"},
        threads=2,
        rounds=5,
        versions={"tensorflow": "2.21.0"},
        limits={"gemm_float32": 490, "gemm_bfloat16": 890, "read_1024mb": 79, "read_100mb": 110},
        missing=[Missing(system="ours", precision="int8", reason="no such weights yet")],
        agreement=[
            Agreement(system="vLLM", precision="float32", logits=2e-6, first_tokens=8, greedy=3)
        ],
        rows=[
            Row(
                task=Task("prefill", 1, 512, "float32"),
                systems={
                    "ours": speed(6000),
                    "transformers": speed(2000, 3.0, "eager, grouped_mm"),
                    "vLLM": speed(6500, 0.92),
                },
                others=0.04,
                idle=0.01,
            ),
            Row(
                task=Task("decode", 1, 512, "int8", new=64),
                systems={"llama.cpp": speed(520)},
                others=0.0,
                idle=0.0,
            ),
        ],
    )
