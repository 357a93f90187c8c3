import pytest

from bench import memory
from ds_model import parameter_counts


def test_without_tokens_a_parameter_is_held_four_times(config):
    assert memory.training_bytes(config, 0) == 16 * parameter_counts(config).main


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_grows_by_the_same_for_every_token(config, recompute):
    held = [memory.training_bytes(config, tokens, recompute=recompute) for tokens in (0, 64, 128)]
    assert held[2] - held[1] == held[1] - held[0] > 0


def test_recomputing_keeps_an_input_a_block_and_one_block_whole(config):
    one = config.replace(num_hidden_layers=1)
    saved = memory.training_bytes(one, 1) - memory.training_bytes(one, 1, recompute=True)
    assert saved == -4 * one.hidden_size  # one block: nothing saved, its input held
    deep = memory.training_bytes(config, 1) - memory.training_bytes(config, 1, recompute=True)
    block = memory.block_values(config, moe=True)
    dense = memory.block_values(config, moe=False)
    assert deep == 4 * (7 * block + dense - max(block, dense) - 8 * config.hidden_size)
