"""Errors to plant: each is a fault that implementations of this model really have had.

A comparison that does not notice them compares nothing. Every plant names the cases on
which it must show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

import ds_attention.mla
import ds_moe.router
from ds_attention import CausalMask, MultiHeadLatentAttention
from ds_attention.rope import YarnConfig
from ds_model.block import MTPModule
from ds_moe.router import Router

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Plant:
    """One fault.

    Attributes:
        name: identifies the plant in test ids.
        cases: names of cases on which the logits must leave the reference.
        patch: puts the fault in.
    """

    name: str
    cases: tuple[str, ...]
    patch: Patch


def _mask(change: Callable[[CausalMask], CausalMask]) -> Patch:
    honest = MultiHeadLatentAttention._attend_expanded

    def planted(layer: Any, q: Any, positions: Any, entries: Any, mask: CausalMask) -> tf.Tensor:
        return honest(layer, q, positions, entries, change(mask))

    return lambda monkeypatch: monkeypatch.setattr(
        MultiHeadLatentAttention, "_attend_expanded", planted
    )


def _one_ahead(mask: CausalMask) -> CausalMask:
    return mask._replace(slots=mask.slots + 1)


def _padding_visible(mask: CausalMask) -> CausalMask:
    return mask._replace(valid=None)


def _rope_order(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ds_attention.mla.apply_rope

    def planted(x: tf.Tensor, positions: tf.Tensor, theta: float, yarn: Any, order: Any) -> Any:
        return honest(x, positions, theta, yarn, not order)

    monkeypatch.setattr(ds_attention.mla, "apply_rope", planted)


def _no_score_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YarnConfig, "score_scale", property(lambda _: 1.0))


def _no_rotation_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(YarnConfig, "rotation_scale", property(lambda _: 1.0))


def _route_openly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the router run step by step: the compiled operation has nothing to patch."""
    monkeypatch.setattr(ds_moe.router, "use_kernels", lambda *_: False)


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

    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_limit_groups", planted)


def _no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_limit_groups", lambda _, choice_TE: choice_TE)


def _masked_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Router._limit_groups

    def planted(self: Router, choice_TE: tf.Tensor) -> tf.Tensor:
        limited = honest(self, choice_TE)
        return tf.where(tf.math.is_inf(limited), 0.0, limited)

    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_limit_groups", planted)


def _gate_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalise where the config says not to, and do not where it says to."""

    def planted(self: Router, scores_TE: tf.Tensor, indices_TK: tf.Tensor) -> tf.Tensor:
        gates = tf.gather(scores_TE, indices_TK, batch_dims=1)
        if not self.config.norm_topk_prob:
            gates /= tf.reduce_sum(gates, axis=-1, keepdims=True)
        return gates * self.config.routed_scaling_factor

    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_gates", planted)


def _bias_in_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Router._gates

    def planted(self: Router, scores_TE: tf.Tensor, indices_TK: tf.Tensor) -> tf.Tensor:
        bias_E = tf.convert_to_tensor(self.e_score_correction_bias)
        return honest(self, scores_TE + bias_E, indices_TK)

    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_gates", planted)


def _gates_without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Router._gates
    _route_openly(monkeypatch)
    monkeypatch.setattr(Router, "_gates", lambda *args: tf.stop_gradient(honest(*args)))


def _shared_key_without_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ds_attention.mla.apply_rope

    def planted(x: tf.Tensor, *rest: Any) -> tf.Tensor:
        rotated = honest(x, *rest)
        return tf.stop_gradient(rotated) if x.shape.rank == 3 else rotated

    monkeypatch.setattr(ds_attention.mla, "apply_rope", planted)


def _hidden_state_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Join as the paper's formula has it, and not as the released weights do."""

    def planted(self: MTPModule, h: tf.Tensor, embedded: tf.Tensor) -> tf.Tensor:
        return self.eh_proj(tf.concat([self.hnorm(h), self.enorm(embedded)], axis=-1))

    monkeypatch.setattr(MTPModule, "_join", planted)


PLANTS: tuple[Plant, ...] = (
    Plant("mask-one-ahead", ("plain", "left-padded"), _mask(_one_ahead)),
    Plant("mask-padding-visible", ("left-padded", "v2-lite"), _mask(_padding_visible)),
    Plant("rope-order", ("released", "plain", "v2-lite"), _rope_order),
    Plant("mscale-of-scores", ("released", "yarn-two-mscales", "v2-lite"), _no_score_scale),
    Plant("mscale-of-rotation", ("yarn-two-mscales",), _no_rotation_scale),
    Plant("group-rule", ("released", "plain", "v2-group-limited"), _group_rule),
    Plant("group-rule-none", ("released", "plain", "v2-group-limited"), _no_groups),
    Plant("group-rule-zero", ("all-moe-negative-bias",), _masked_with_zero),
    Plant("gate-normalisation", ("released", "coarse-epsilon", "v2-lite"), _gate_normalisation),
    Plant("bias-in-gates", ("released", "left-padded", "coarse-epsilon"), _bias_in_gates),
)
"""Faults in mask, RoPE order, mscale, group rule, gate normalisation and gates' bias."""

GRADIENT_PLANTS: tuple[Plant, ...] = (
    Plant("gates-without-slope", ("released",), _gates_without_slope),
    Plant("shared-key-without-slope", ("released",), _shared_key_without_slope),
)
"""Faults that leave the logits as they are, and must show in a gradient."""

MTP_PLANTS: tuple[Plant, ...] = (
    Plant("mtp-hidden-state-first", ("released", "two-mtp-modules"), _hidden_state_first),
)
"""Faults that must show in the MTP modules' logits."""
