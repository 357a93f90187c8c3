import numpy as np
import pytest
import tensorflow as tf

from ds_moe import MixtureOfExperts, MoEConfig, SwiGLU

BASE = MoEConfig(
    hidden_size=10,
    moe_intermediate_size=6,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
    initializer_range=0.5,
)


def made(**changes) -> MixtureOfExperts:
    kwargs = {"dtype": changes.pop("dtype")} if "dtype" in changes else {}
    layer = MixtureOfExperts(MoEConfig(**(BASE.to_dict() | changes)), **kwargs)
    layer.build((None, None, 10))
    return layer


def ffn(x, gate_up, down):
    gate, up = np.split(x @ gate_up, 2, -1)
    return (gate / (1 + np.exp(-gate)) * up) @ down


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_is_the_gated_sum_of_the_chosen_plus_the_shared(shared):
    layer = made(n_shared_experts=shared)
    x = np.random.default_rng(0).normal(size=(2, 7, 10)).astype(np.float32)
    y, routing = layer(x)

    expected = np.zeros((14, 10))
    for t, token in enumerate(x.reshape(14, 10)):
        for e, gate in zip(routing.indices[t].numpy(), routing.gates[t].numpy(), strict=True):
            expected[t] += gate * ffn(
                token, layer.gate_up_proj.numpy()[e], layer.down_proj.numpy()[e]
            )
        if shared:
            s = layer.shared_experts
            expected[t] += ffn(token, s.gate_up_proj.kernel.numpy(), s.down_proj.kernel.numpy())
    np.testing.assert_allclose(y, expected.reshape(2, 7, 10), atol=1e-5)
    if shared:
        assert layer.shared_experts.intermediate_size == 6 * shared
    else:
        assert layer.shared_experts is None


def test_the_forward_pass_writes_no_variable():
    layer = made()
    before = layer.get_weights()
    layer(tf.random.stateless_normal([2, 5, 10], seed=[0, 1]), training=True)

    for a, b in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_counts_in_no_load():
    layer = made()
    x = tf.random.stateless_normal([2, 4, 10], seed=[2, 3])
    _, routing = layer(x, tf.constant([[0, 0, 1, 1], [1, 1, 1, 0]]))

    assert float(tf.reduce_sum(routing.load)) == 5 * 3


def test_bfloat16_routes_as_float32_does():
    exact, low = made(), made(dtype="mixed_bfloat16")
    low.set_weights(exact.get_weights())
    x = tf.cast(tf.random.stateless_normal([4, 16, 10], seed=[4, 5]), tf.bfloat16)
    y, routing = low(x)
    y32, routing32 = exact(tf.cast(x, tf.float32))

    assert y.dtype == tf.bfloat16
    np.testing.assert_array_equal(routing.indices, routing32.indices)
    assert np.abs(tf.cast(y, tf.float32) - y32).max() < 0.03 * np.abs(y32).max()


def test_xla_gives_the_same():
    layer = made()
    x = tf.random.stateless_normal([3, 6, 10], seed=[6, 7])

    np.testing.assert_allclose(tf.function(layer, jit_compile=True)(x)[0], layer(x)[0], atol=1e-5)


def test_comes_back_from_its_config():
    layer = made(n_shared_experts=2)
    again = MixtureOfExperts.from_config(layer.get_config())
    again.build((None, None, 10))
    again.set_weights(layer.get_weights())

    x = tf.random.stateless_normal([1, 3, 10], seed=[8, 9])
    np.testing.assert_array_equal(layer(x)[0], again(x)[0])


def test_swiglu_is_the_closed_form_and_comes_back_from_its_config():
    layer = SwiGLU(10, 7, 0.4)
    x = np.random.default_rng(1).normal(size=(2, 3, 10)).astype(np.float32)
    y = layer(x)

    kernels = [layer.gate_up_proj.kernel.numpy(), layer.down_proj.kernel.numpy()]
    np.testing.assert_allclose(y, ffn(x, *kernels), atol=1e-5)
    again = SwiGLU.from_config(layer.get_config())
    again(x)
    again.set_weights(layer.get_weights())
    np.testing.assert_array_equal(again(x), y)
    assert layer.compute_output_shape((None, 10)) == (None, 10)


@pytest.mark.parametrize("layer", [SwiGLU(10, 4), MixtureOfExperts(BASE)])
def test_a_wrong_width_is_named(layer):
    with pytest.raises(ValueError, match="input has 9 features; hidden_size is 10"):
        layer(tf.zeros([1, 2, 9]))
