import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_attention import YarnConfig, apply_rope, rope_frequencies

V3 = YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0)


@pytest.mark.parametrize("interleave", [True, False])
def test_rotation_is_multiplication_by_a_complex_number(interleave):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 3000, size=(2, 5))

    pairs = x.reshape(2, 5, 3, 4, 2) if interleave else np.stack(np.split(x, 2, -1), -1)
    angles = positions[..., None] * 10000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, :, None]
    expected = np.concatenate([turned.real, turned.imag], -1)

    ours = apply_rope(tf.constant(x), tf.constant(positions), interleave=interleave)
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # float32 angles up to 3000


@settings(deadline=None, max_examples=30)
@given(
    first=st.integers(0, 200),
    second=st.integers(0, 200),
    shift=st.integers(0, 300),
    interleave=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_depend_on_the_distance_alone(first, second, shift, interleave, seed):
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, 1, 1, 16)).astype(np.float32)

    def product(move: int) -> float:
        def turned(x, position):
            return apply_rope(
                tf.constant(x[None]), tf.constant([[position + move]]), interleave=interleave
            )

        return float(tf.reduce_sum(turned(q[0], first) * turned(k[0], second)))

    assert product(shift) == pytest.approx(product(0), abs=2e-3)


def test_one_key_for_all_heads_turns_like_each_head():
    x = tf.random.stateless_normal([2, 4, 6], seed=[0, 1])
    positions = tf.constant([[0, 1, 2, 3]])

    alone = apply_rope(x, positions)
    headed = apply_rope(tf.repeat(x[:, :, None], 3, axis=2), positions)
    for head in range(3):
        np.testing.assert_array_equal(headed[:, :, head], alone)


def test_yarn_interpolates_where_the_paper_says():
    # arXiv 2309.00071, eq. 17 with V3's numbers: a pair turns r times over 4096 tokens when its
    # index is 32 ln(4096 / 2 pi r) / ln 10000: 10.5 for r = 32, 22.5 for r = 1.
    plain, yarn = rope_frequencies(64, 10000.0), rope_frequencies(64, 10000.0, V3)

    np.testing.assert_allclose(yarn[:11], plain[:11], rtol=1e-6)
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40, rtol=1e-6)
    between = yarn[11:23] / plain[11:23]
    assert (np.diff(between) < 0).all()
    assert (between < 1).all()
    assert (between > 1 / 40).all()


def test_frequencies_without_yarn_are_powers_of_theta():
    np.testing.assert_allclose(
        rope_frequencies(8, 100.0), [1, 100**-0.25, 100**-0.5, 100**-0.75], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("yarn", "rotation", "score"),
    [
        (V3, 1.0, (0.1 * math.log(40) + 1) ** 2),
        (YarnConfig(40, 4096, mscale=0.707, mscale_all_dim=0.707), 1.0, 1.2608037**2),
        (YarnConfig(40, 4096), 1.3688879, 1.0),
        (YarnConfig(40, 4096, mscale=2.0, mscale_all_dim=1.0), 1.7377759 / 1.3688879, 1.3688879**2),
        (YarnConfig(40, 4096, mscale=0.0, mscale_all_dim=1.0), 1.3688879, 1.3688879**2),
        (YarnConfig(1, 4096), 1.0, 1.0),
        (YarnConfig(40, 4096, attention_factor=0.5), 0.5, 1.0),
    ],
)
def test_temperature_of_rotation_and_scores(yarn, rotation, score):
    assert yarn.rotation_scale == pytest.approx(rotation, rel=1e-6)
    assert yarn.score_scale == pytest.approx(score, rel=1e-6)


def test_yarn_scale_multiplies_the_rotated_vector():
    x = tf.random.stateless_normal([1, 3, 8], seed=[5, 6])
    positions = tf.constant([[0, 70, 9000]])
    yarn = YarnConfig(4, 64, attention_factor=2.5)
    same = YarnConfig(4, 64, attention_factor=1.0)

    np.testing.assert_allclose(
        apply_rope(x, positions, yarn=yarn), 2.5 * apply_rope(x, positions, yarn=same), rtol=1e-5
    )


def test_a_ramp_without_width_is_a_step():
    # beta_fast = beta_slow: pairs below the boundary keep their frequency, those above do not.
    yarn = YarnConfig(8, 64, beta_fast=4, beta_slow=4, truncate=False)
    ratio = rope_frequencies(16, 10000.0, yarn) / rope_frequencies(16, 10000.0)
    boundary = 16 * math.log(64 / (4 * 2 * math.pi)) / (2 * math.log(10000))

    np.testing.assert_allclose(ratio[: math.floor(boundary) + 1], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[math.floor(boundary) + 1 :], 1 / 8, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"factor": 0.5, "original_max_position_embeddings": 64}, "factor is 0.5"),
        (
            {"factor": 2, "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 0",
        ),
    ],
)
def test_bad_yarn_is_named(values, named):
    with pytest.raises(ValueError, match=named):
        YarnConfig(**values)
