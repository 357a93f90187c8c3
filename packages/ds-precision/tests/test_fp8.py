"""FP8 products against loops over tiles in NumPy with ml_dtypes, and closed forms."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_precision import (
    E4M3,
    E5M6,
    Fp8Policy,
    Fp8Recipe,
    Linear,
    dequantize_blocks,
    fp8_matmul,
    fp8_recipe,
    watch_fp8,
    without_fp8,
)
from ds_precision.fp8 import FORMATS, eight_bit_product

TYPES = {"E4M3": (ml_dtypes.float8_e4m3fn, 448.0), "E5M2": (ml_dtypes.float8_e5m2, 57344.0)}


def rounded(x, block, fmt="E4M3", power_of_two=False):
    """What a matrix becomes, in float64, one block after the other."""
    kind, most = TYPES[fmt]
    found = np.zeros(x.shape)
    for r in range(0, x.shape[0], block[0]):
        for c in range(0, x.shape[1], block[1]):
            here = np.s_[r : r + block[0], c : c + block[1]]
            amax = np.abs(x[here]).max()
            scale = np.float32(1) if amax == 0 else np.float32(amax) / np.float32(most)
            if power_of_two:
                least = np.maximum(np.float32(amax), np.float32(1e-4)) / np.float32(most)
                scale = np.float32(2.0) ** np.ceil(np.log2(least))
            small = np.clip(x[here] / scale, -most, most).astype(kind)
            found[here] = small.astype(np.float64) * scale
    return found


def three_products(x, w, dy, tile, power_of_two=False, gradient="E4M3"):
    """Section 3.3.1 of the paper, figure 6, in float64."""
    rows, blocks = (1, tile), (tile, tile)
    small_x, small_w = (rounded(m, b, "E4M3", power_of_two) for m, b in ((x, rows), (w, blocks)))
    small_dy = rounded(dy, rows, gradient, power_of_two)
    tall_x = rounded(small_x.astype(np.float32), (tile, 1), "E4M3", power_of_two)
    tall_dy = rounded(dy, (tile, 1), gradient, power_of_two)
    return small_x @ small_w, small_dy @ small_w.T, tall_x.T @ tall_dy


def operands(rows, inner, outer, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, inner), (inner, outer), (rows, outer)
    return [
        (rng.normal(size=shape) * np.exp(rng.normal(size=shape[1]))).astype(np.float32)
        for shape in shapes
    ]


def run(x, w, dy, recipe, **options):
    x, w = tf.constant(x), tf.constant(w)
    with tf.GradientTape() as tape:
        tape.watch([x, w])
        y = fp8_matmul(x, w, recipe, **options)
    return [y, *tape.gradient(y, [x, w], tf.constant(dy))]


def assert_near(found, expected, tolerance=2e-6):
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one.numpy() - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("gradient", ["E4M3", "E5M2"])
@pytest.mark.parametrize(("shape", "tile"), [((37, 200, 150), 128), ((70, 96, 33), 32)], ids=str)
def test_all_three_products_equal_loops_over_tiles(shape, tile, gradient, power_of_two):
    x, w, dy = operands(*shape)
    recipe = Fp8Recipe(tile=tile, gradient_format=gradient, power_of_two=power_of_two)
    expected = three_products(x, w, dy, tile, power_of_two, gradient)
    assert_near(run(x, w, dy, recipe), expected)


def test_leading_axes_are_rows():
    x, w, dy = operands(24, 64, 48)
    found = run(x.reshape(2, 12, 64), w, dy.reshape(2, 12, 48), Fp8Recipe(tile=32))
    assert found[0].shape == (2, 12, 48)
    flat = [found[0], tf.reshape(found[1], [24, 64]), found[2]]
    flat[0] = tf.reshape(flat[0], [24, 48])
    assert_near(flat, three_products(x, w, dy, 32))


def test_one_scale_a_matrix():
    x, w, dy = operands(30, 64, 48)
    huge = 1 << 20  # one tile holds all
    found = run(x, w, dy, Fp8Recipe(scaling="tensor"))
    small_x, small_w = rounded(x, (huge, huge)), rounded(w, (huge, huge))
    small_dy = rounded(dy, (huge, huge))
    again = rounded(small_x.astype(np.float32), (huge, huge))
    assert_near(found, (small_x @ small_w, small_dy @ small_w.T, again.T @ small_dy))


def test_bfloat16_operands_are_exact_where_scales_are_powers_of_two():
    x, w, dy = (tf.cast(m, tf.bfloat16) for m in operands(40, 128, 64))
    exact = [tf.cast(m, tf.float32).numpy() for m in (x, w, dy)]
    y, dx, dw = run(x, tf.cast(w, tf.float32), dy, Fp8Recipe(tile=32, power_of_two=True))
    assert (y.dtype, dx.dtype, dw.dtype) == (tf.bfloat16, tf.bfloat16, tf.float32)
    expected = three_products(*exact, 32, power_of_two=True)
    assert_near([tf.cast(y, tf.float32), tf.cast(dx, tf.float32)], expected[:2], 2**-8)
    assert_near([dw], expected[2:])


def test_e5m6_input_has_powers_of_two_and_six_bits():
    x, w, dy = operands(16, 64, 32)
    seen = {}
    with watch_fp8(lambda name, _, small, fmt: seen.setdefault(name, (small, fmt))):
        run(x, w, dy, Fp8Recipe(tile=32), input_format=E5M6, name="o_proj")
    small, fmt = seen["o_proj/input"]
    assert fmt is E5M6
    assert np.all(np.log2(small.scales.numpy()) % 1 == 0)
    read = small.values.numpy().astype(np.float64) * np.repeat(small.scales, 32, axis=1)
    assert np.all(np.abs(read - x) <= E5M6.worst_relative_error * np.abs(x) * (1 + 1e-6))
    assert set(seen) == {"o_proj/input", "o_proj/weight", "o_proj/gradient"}
    assert seen["o_proj/weight"][1] is E4M3


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    tile=st.sampled_from([4, 32, 128]),
    seed=st.integers(0, 99),
)
def test_error_is_within_what_rounding_allows(rows, inner, outer, tile, seed):
    # Each operand moves by at most 2^-4 of itself, or half a subnormal step of its block.
    x, w, _ = operands(rows, inner, outer, seed)
    y = fp8_matmul(tf.constant(x), tf.constant(w), Fp8Recipe(tile=tile)).numpy()
    u, step = E4M3.worst_relative_error, E4M3.smallest_subnormal / 2 / E4M3.max
    wide_x = np.abs(x) * u + step * np.abs(x).max()
    wide_w = np.abs(w) * u + step * np.abs(w).max()
    bound = wide_x @ np.abs(w) + np.abs(x) @ wide_w + wide_x @ wide_w
    assert np.all(np.abs(y - x.astype(np.float64) @ w) <= bound * (1 + 1e-4) + 1e-30)


def test_an_outlier_costs_precision_in_its_own_tile_alone():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 256)).astype(np.float32)
    x[0, 0] = 1e6  # the rest of the matrix falls below E4M3's normal numbers beside it
    w = rng.normal(size=(256, 32)).astype(np.float32)
    exact = x.astype(np.float64) @ w

    def error(recipe):
        y = fp8_matmul(tf.constant(x), tf.constant(w), recipe).numpy()
        return np.abs(y - exact)[1:].mean() / np.abs(exact)[1:].mean()

    assert error(Fp8Recipe()) < 0.05
    assert error(Fp8Recipe(scaling="tensor")) > 0.9


def test_narrow_sums_stall_and_promotion_cures_them():
    # Ones times ones: 32 are added at a time. With 4 bits 512 + 32 is cut back to 512, for ever.
    x, w = tf.ones([2, 4096]), tf.ones([4096, 3])
    four_bits = Fp8Recipe(accumulator_bits=4)
    assert np.all(fp8_matmul(x, w, four_bits).numpy() == 512)
    promoted = Fp8Recipe(accumulator_bits=4, promote_every=128)
    assert np.all(fp8_matmul(x, w, promoted).numpy() == 4096)


def test_wide_sums_equal_float32_ones():
    x, w, dy = operands(33, 200, 50)
    narrow = run(x, w, dy, Fp8Recipe(tile=32, accumulator_bits=24))
    assert_near(narrow, three_products(x, w, dy, 32))


def test_policy_survives_serialisation():
    policy = Fp8Policy("mixed_bfloat16", Fp8Recipe(tile=64, power_of_two=True))
    assert (policy.compute_dtype, policy.variable_dtype) == ("bfloat16", "float32")
    again = keras.dtype_policies.deserialize(keras.dtype_policies.serialize(policy))
    assert again == policy
    assert hash(again) == hash(policy)
    assert again != Fp8Policy("mixed_bfloat16")
    layer = Linear(8, fp8_input_format="E5M6", dtype=policy)
    copy = Linear.from_config(layer.get_config())
    assert copy.dtype_policy == policy
    assert copy.fp8_input_format == "E5M6"


def test_recipe_and_plain_policy_of_a_policy():
    policy = Fp8Policy("float32", {"tile": 32})
    assert fp8_recipe(policy) == Fp8Recipe(tile=32)
    assert fp8_recipe(keras.dtype_policies.get("float32")) is None
    assert without_fp8(policy).name == "float32"
    assert without_fp8(keras.dtype_policies.get("mixed_float16")).name == "mixed_float16"


def test_a_layer_takes_the_policy():
    x, w, dy = operands(20, 64, 48)
    layer = Linear(48, dtype=Fp8Policy("float32", {"tile": 32}))
    layer.build((None, 64))
    layer.kernel.assign(w)
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    dx, dw = tape.gradient(y, [x, layer.kernel.value], tf.constant(dy))
    assert_near([y, dx, dw], three_products(x.numpy(), w, dy, 32))


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("tile", 0, "1 or more"),
        ("scaling", "row", "'block' or 'tensor'"),
        ("gradient_format", "E3M4", "'E4M3' or 'E5M2'"),
        ("accumulator_bits", 1, "2 to 24"),
        ("promote_every", 100, "multiple of 32"),
    ],
)
def test_a_bad_recipe_says_what_would_be_right(field, value, right):
    with pytest.raises(ValueError, match=rf"{field} is {value!r}.*{right}"):
        Fp8Recipe(**{field: value})


def test_bad_source_and_format_are_named():
    with pytest.raises(ValueError, match="source is 'float16'"):
        Fp8Policy("float16")
    with pytest.raises(ValueError, match=r"fp8_input_format is 'E8M0'.*E4M3"):
        Linear(4, fp8_input_format="E8M0")


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 40),
    inner=st.integers(1, 300),
    outer=st.integers(1, 200),
    tile=st.sampled_from([64, 128]),
    fmt=st.sampled_from(["E4M3", "E5M2"]),
    whole=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_products_of_8_bit_numbers_are_those_of_what_they_mean(
    tokens, inner, outer, tile, fmt, whole, seed
):
    """The form for GPUs, on a CPU."""
    rng = np.random.default_rng(seed)
    how = Fp8Recipe(tile=tile, scaling="tensor" if whole else "block")
    x = tf.constant(
        rng.normal(size=(tokens, inner)) * 10.0 ** rng.integers(-3, 3, inner), "float32"
    )
    w = tf.constant(rng.normal(size=(inner, outer)), "float32")
    left, right = how.rows(x, FORMATS[fmt]), how.blocks(w)
    exact = tf.cast(dequantize_blocks(left), tf.float64) @ tf.cast(
        dequantize_blocks(right), tf.float64
    )

    found = eight_bit_product(left, right).numpy()
    size = np.abs(dequantize_blocks(left).numpy()) @ np.abs(dequantize_blocks(right).numpy())
    assert (np.abs(found - exact) <= 1e-5 * size + 1e-30).all()


@pytest.mark.parametrize("form", ["bits", "read", "narrow"])
@pytest.mark.parametrize("scaling", ["block", "tensor"])
def test_products_of_stacks_are_those_of_their_matrices(scaling, form, monkeypatch):
    how = Fp8Recipe(tile=32, scaling=scaling, accumulator_bits=24 if form == "narrow" else 0)
    monkeypatch.setattr(Fp8Recipe, "multiplies_bits", lambda *_: form == "bits")
    x, w, dy = (
        tf.random.stateless_normal([3, *shape], seed=[1, shape[0]])
        for shape in ((40, 70), (70, 50), (40, 50))
    )

    def products(x, w, dy):
        small_w = how.blocks(w)
        return [
            how.product(how.rows(x), small_w, tf.float32),
            how.product(how.rows(dy), small_w, tf.float32, transpose_b=True),
            how.product(how.columns(x), how.columns(dy), tf.float32, transpose_a=True),
        ]

    found = tf.function(products, jit_compile=True)(x, w, dy)
    monkeypatch.undo()
    for i in range(3):
        expected = [m.numpy() for m in products(x[i], w[i], dy[i])]
        assert_near([stack[i] for stack in found], expected)


def test_tiles_that_differ_are_named():
    one, two = Fp8Recipe(tile=64), Fp8Recipe(tile=128)
    with pytest.raises(ValueError, match="a has tiles of 64 along the inner size, b of 128"):
        eight_bit_product(one.rows(tf.ones([2, 256])), two.blocks(tf.ones([256, 2])))


def test_under_xla_a_gpu_would_take_that_form(monkeypatch):
    """Both passes, on a CPU that says it is a GPU: the numbers of the other form."""
    x = tf.random.stateless_normal([70, 200], seed=[1, 2])
    w = tf.random.stateless_normal([200, 150], seed=[3, 4])

    def step(x, w):
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = fp8_matmul(x, w)
            loss = tf.reduce_sum(y * tf.sin(tf.range(150.0)))
        return [y, *tape.gradient(loss, [x, w])]

    expected = tf.function(step, jit_compile=True)(x, w)
    monkeypatch.setattr(Fp8Recipe, "multiplies_bits", lambda *_: True)
    found = tf.function(step, jit_compile=True)(x, w)
    for ours, other in zip(found, expected, strict=True):
        assert np.abs(ours - other).max() < 1e-5 * np.abs(other).max()
