import pytest

from bench import cost
from bench.tasks import Task
from ds_model import parameter_counts

LIMITS = {"gemm_float32": 490.0, "gemm_bfloat16": 890.0, "read_1024mb": 79.0}


def test_multiplications_are_those_counted_by_hand_for_preset_bench(config):
    # Per token: attention, dense block, experts, head; see the shapes in presets.py.
    attention = 512 * 192 + 192 * 8 * 96 + 512 * 160 + 128 * 8 * 128 + 512 * 512
    experts = 5 * 3 * 512 * 256 + 512 * 32
    products = 8 * attention + 3 * 512 * 1536 + 7 * experts
    norms = 8 * (2 * 512 + 192 + 128) + 512 + 7 * 32
    assert cost.prefill_flops(config) == pytest.approx(2 * (products + norms), rel=1e-3)
    assert cost.train_flops(config) / 1e6 == pytest.approx(157, abs=0.5)
    assert cost.prefill_flops(config) / 1e6 == pytest.approx(44, abs=0.5)


@pytest.mark.parametrize(
    ("precision", "megabytes"), [("float32", 105), ("bfloat16", 52), ("int8", 28)]
)
def test_one_token_reads_its_active_weights(config, precision, megabytes):
    task = Task("decode", 1, 0, precision)
    assert cost.decode_bytes(config, task) / 1e6 == pytest.approx(megabytes, abs=0.6)


def test_more_rows_touch_more_experts_but_never_more_than_there_are(config):
    touched = [cost.touched_weights(config, batch) for batch in (1, 2, 8, 32, 10_000)]
    assert touched == sorted(touched)
    assert touched[0] == parameter_counts(config).active
    embedding = config.vocab_size * config.hidden_size
    assert touched[-1] == pytest.approx(parameter_counts(config).main - embedding)


def test_two_rows_touch_the_mean_over_all_pairs_of_choices(config):
    few = config.replace(n_routed_experts=4, num_experts_per_tok=1, n_group=1, topk_group=1)
    extra = cost.touched_weights(few, 2) - cost.touched_weights(few, 1)
    # Of the 16 pairs of choices, 12 differ: three quarters of an expert more in 7 layers.
    assert extra == pytest.approx(7 * 0.75 * cost.expert_size(few))


def test_a_dense_model_reads_the_same_weights_whatever_the_batch(config):
    dense = config.replace(n_routed_experts=None)
    assert cost.touched_weights(dense, 32) == cost.touched_weights(dense, 1)


def test_the_cache_adds_one_latent_a_position_layer_and_row(config):
    none, some = (Task("decode", 3, length, "float32") for length in (0, 1000))
    added = cost.decode_bytes(config, some) - cost.decode_bytes(config, none)
    assert added == 3 * 8 * 1000 * (128 + 32) * 4


def test_limits_bind_where_they_should(config):
    training = cost.limit_speed(config, Task("train", 8, 256, "bfloat16"), LIMITS)
    assert training == pytest.approx(890e9 / cost.train_flops(config))
    alone = Task("decode", 1, 0, "float32")
    assert cost.limit_speed(config, alone, LIMITS) == pytest.approx(79e9 / 104.84e6, rel=1e-3)
    crowd = Task("decode", 4096, 0, "float32")
    products = 490e9 / cost.decode_flops(config)
    assert cost.limit_speed(config, crowd, LIMITS) == pytest.approx(products)
    assert cost.limit_speed(config, alone, {}) is None
