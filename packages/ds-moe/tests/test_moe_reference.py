"""Router and experts against transformers' layers on the same weights (`reference/`).

The files are written by `python -m parity.write_references`: 48 tokens through one layer of V3
or V2. "Within e": largest absolute difference over largest absolute reference; chosen experts
compared as sets.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import ds_moe.router
from ds_moe import MixtureOfExperts, MoEConfig, Router

FILES = sorted((Path(__file__).parent / "reference").glob("*.npz"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
Arrays = dict[str, np.ndarray]


def read(path: Path) -> tuple[MixtureOfExperts, Arrays]:
    with np.load(path) as file:
        arrays = dict(file)
    config = MoEConfig(**json.loads(str(arrays.pop("config"))))
    layer = MixtureOfExperts(config)
    layer.build((None, None, config.hidden_size))
    weights = {
        name.removeprefix("weights."): array
        for name, array in arrays.items()
        if name.startswith("weights.")
    }
    layer.gate.weight.assign(weights["gate.weight"].T)
    if config.has_router_bias:
        layer.gate.e_score_correction_bias.assign(weights["gate.e_score_correction_bias"])
    # transformers keeps the experts stacked too, each [out, in].
    layer.gate_up_proj.assign(weights["experts.gate_up_proj"].transpose(0, 2, 1))
    layer.down_proj.assign(weights["experts.down_proj"].transpose(0, 2, 1))
    if layer.shared_experts is not None:
        pair = weights["shared_experts.gate_proj.weight"], weights["shared_experts.up_proj.weight"]
        layer.shared_experts.gate_up_proj.kernel.assign(np.concatenate(pair).T)
        layer.shared_experts.down_proj.kernel.assign(weights["shared_experts.down_proj.weight"].T)
    return layer, arrays


def apart(mine: tf.Tensor, theirs: np.ndarray) -> float:
    return float(np.abs(mine.numpy() - theirs).max() / np.abs(theirs).max())


def test_there_are_files() -> None:
    assert len(FILES) == 5


@every_file
def test_chosen_experts_and_gates(path: Path) -> None:
    layer, arrays = read(path)
    routing = layer(arrays["x"])[1]
    mine, theirs = np.argsort(routing.indices), np.argsort(arrays["experts"])
    np.testing.assert_array_equal(
        np.take_along_axis(routing.indices.numpy(), mine, 1),
        np.take_along_axis(arrays["experts"], theirs, 1),
    )
    gates = np.take_along_axis(arrays["gates"], theirs, 1)
    assert apart(tf.gather(routing.gates, mine, batch_dims=1), gates) < 1e-5
    load = np.bincount(arrays["experts"].ravel(), minlength=routing.scores.shape[1])
    np.testing.assert_array_equal(routing.load, load)


def output_and_gradient(
    layer: MixtureOfExperts, x: tf.Tensor, out_slope: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(x)[0]
        value = tf.reduce_sum(out * out_slope)
    return out, tape.gradient(value, x)


@every_file
def test_output_and_gradient(path: Path) -> None:
    layer, arrays = read(path)
    out, slope = output_and_gradient(layer, tf.constant(arrays["x"]), arrays["out_slope"])
    assert apart(out, arrays["out"]) < 1e-5
    assert apart(slope, arrays["x_slope"]) < 1e-5


# Graph mode and XLA run the experts by different programs; XLA takes seconds to compile.
@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_compiled_output_and_gradient(jit_compile: bool) -> None:
    layer, arrays = read(Path(__file__).parent / "reference" / "released.npz")
    run = tf.function(output_and_gradient, jit_compile=jit_compile, autograph=False)
    out, slope = run(layer, tf.constant(arrays["x"]), tf.constant(arrays["out_slope"]))
    assert apart(out, arrays["out"]) < 1e-5
    assert apart(slope, arrays["x_slope"]) < 1e-5


def _group_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """V3's groups by V2's rule, and V2's by V3's."""

    def planted(self: Router, choice_TE: tf.Tensor) -> tf.Tensor:
        c = self.config
        choice_TGM = tf.reshape(choice_TE, [-1, c.n_group, c.experts_per_group])
        best = 1 if c.topk_method == "noaux_tc" else 2
        group_TG = tf.reduce_sum(tf.math.top_k(choice_TGM, best).values, axis=-1)
        chosen = tf.math.top_k(group_TG, c.topk_group).indices
        kept_TG = tf.reduce_sum(tf.one_hot(chosen, c.n_group), axis=1)
        limited = tf.where(kept_TG[..., None] > 0, choice_TGM, float("-inf"))
        return tf.reshape(limited, tf.shape(choice_TE))

    monkeypatch.setattr(Router, "_limit_groups", planted)


def _masked_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Router._limit_groups

    def planted(self: Router, choice_TE: tf.Tensor) -> tf.Tensor:
        limited = honest(self, choice_TE)
        return tf.where(tf.math.is_inf(limited), 0.0, limited)

    monkeypatch.setattr(Router, "_limit_groups", planted)


def _gate_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Router, scores_TE: tf.Tensor, indices_TK: tf.Tensor) -> tf.Tensor:
        gates = tf.gather(scores_TE, indices_TK, batch_dims=1)
        if not self.config.norm_topk_prob:
            gates /= tf.reduce_sum(gates, axis=-1, keepdims=True)
        return gates * self.config.routed_scaling_factor

    monkeypatch.setattr(Router, "_gates", planted)


def _bias_in_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Router._gates

    def planted(self: Router, scores_TE: tf.Tensor, indices_TK: tf.Tensor) -> tf.Tensor:
        bias_E = tf.convert_to_tensor(self.e_score_correction_bias)
        return honest(self, scores_TE + bias_E, indices_TK)

    monkeypatch.setattr(Router, "_gates", planted)


@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (_group_rule, ("released", "negative-bias", "not-normalised", "group-limited")),
        (_masked_with_zero, ("negative-bias",)),
        (_gate_normalisation, ("released", "not-normalised", "greedy")),
        (_bias_in_gates, ("released", "negative-bias", "not-normalised")),
    ],
)
def test_planted_error_shows(
    plant: object, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Step by step: the compiled operation has nothing to patch.
    monkeypatch.setattr(ds_moe.router, "use_kernels", lambda *_: False)
    plant(monkeypatch)
    for path in FILES:
        if path.stem in names:
            layer, arrays = read(path)
            assert apart(layer(arrays["x"])[0], arrays["out"]) > 1e-2, path.stem
