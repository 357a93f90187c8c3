"""Latent attention against transformers' layer on the same weights (`reference/`).

The files are written by `python -m parity.write_references`: two rows of 30 tokens, the second
padded on the left, positions beyond YaRN's original length. "Within e": largest absolute
difference over largest absolute reference.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import ds_attention.mla
from ds_attention import AttentionConfig, LatentCache, MultiHeadLatentAttention, causal_mask
from ds_attention.rope import YarnConfig

FILES = sorted((Path(__file__).parent / "reference").glob("*.npz"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
Arrays = dict[str, np.ndarray]


def read(path: Path) -> tuple[AttentionConfig, Arrays]:
    with np.load(path) as file:
        arrays = dict(file)
    values = json.loads(str(arrays.pop("config")))
    known = YarnConfig.__dataclass_fields__
    if scaling := values["rope_scaling"]:
        values["rope_scaling"] = YarnConfig(**{k: v for k, v in scaling.items() if k in known})
    return AttentionConfig(**values), arrays


def layer_with(config: AttentionConfig, arrays: Arrays) -> MultiHeadLatentAttention:
    layer = MultiHeadLatentAttention(config)
    layer.build((None, None, config.hidden_size))
    for name, array in arrays.items():
        if not name.startswith("weights."):
            continue
        _, part, kind = name.split(".")
        owner = getattr(layer, part)
        if kind == "bias" or "norm" in part:
            getattr(owner, kind).assign(array)
        else:
            owner.kernel.assign(array.T)
    return layer


def apart(mine: tf.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(mine.numpy() - theirs).max() / np.abs(theirs).max())


def run(layer: MultiHeadLatentAttention, arrays: Arrays) -> tf.Tensor:
    """Return the output with zeros where there is padding, as the files have it."""
    valid = arrays["valid"]
    mask = causal_mask(tf.range(valid.shape[1])[None], valid.shape[1], tf.constant(valid))
    out = layer(arrays["x"], arrays["positions"], mask)
    return out * tf.constant(valid[..., None], tf.float32)


def test_there_are_files() -> None:
    assert len(FILES) == 4


@every_file
def test_output_and_gradient(path: Path) -> None:
    config, arrays = read(path)
    layer, x = layer_with(config, arrays), tf.Variable(arrays["x"])
    with tf.GradientTape() as tape:
        out = run(layer, arrays | {"x": x})
        value = tf.reduce_sum(out * arrays["out_slope"])
    assert apart(out, arrays["out"]) < 1e-5
    assert apart(tape.gradient(value, x), arrays["x_slope"]) < 1e-5


@every_file
@pytest.mark.parametrize("absorb", [False, True], ids=["expanded", "absorbed"])
def test_with_cache_in_chunks(path: Path, absorb: bool) -> None:
    config, arrays = read(path)
    layer = layer_with(config, arrays)
    valid = tf.constant(arrays["valid"])
    length = valid.shape[1]
    cache = LatentCache.allocate(config, 2, length)
    parts = []
    for start, end in ((0, 13), (13, 14), (14, 23), (23, 30)):
        slots = tf.range(start, end)[None]
        out, cache = layer.attend(
            arrays["x"][:, start:end],
            cache,
            slots,
            arrays["positions"][:, start:end],
            causal_mask(slots, length, valid),
            absorb,
        )
        parts.append(out)
    out = tf.concat(parts, axis=1) * tf.constant(arrays["valid"][..., None], tf.float32)
    assert apart(out, arrays["out"]) < 1e-5


def _one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ds_attention.mla.masked_softmax
    shifted = lambda m: m | tf.concat([m[..., :1], m[..., :-1]], axis=-1)  # noqa: E731
    monkeypatch.setattr(ds_attention.mla, "masked_softmax", lambda s, m: honest(s, shifted(m)))


def _rope_order(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ds_attention.mla.apply_rope
    monkeypatch.setattr(
        ds_attention.mla,
        "apply_rope",
        lambda x, at, theta, yarn, order: honest(x, at, theta, yarn, not order),
    )


def _mscale_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YarnConfig, "score_scale", property(lambda _: 1.0))


def _mscale_of_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YarnConfig, "rotation_scale", property(lambda _: 1.0))


@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (_one_ahead, ("released", "halves", "two-mscales", "without-mscale")),
        (_rope_order, ("released", "halves", "two-mscales", "without-mscale")),
        (_mscale_of_scores, ("released", "two-mscales")),
        (_mscale_of_rotation, ("two-mscales", "without-mscale")),
    ],
)
def test_planted_error_shows(
    plant: object, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for path in FILES:
        if path.stem in names:
            config, arrays = read(path)
            assert apart(run(layer_with(config, arrays), arrays), arrays["out"]) > 1e-3, path.stem
