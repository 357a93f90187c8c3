import keras
import numpy as np
import pytest

import ds_precision.choice
from ds_model import CausalLM, ModelConfig

# A small vocabulary and sharp logits: drafts are accepted now and then even with random weights.
CONFIG = ModelConfig.preset("tiny").replace(
    vocab_size=6,
    num_nextn_predict_layers=2,
    initializer_range=0.3,
    eos_token_id=None,
    rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0},
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    keras.utils.set_random_seed(3)
    return CausalLM(CONFIG)


def prompt(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, length))


def is_greedy(model: CausalLM, text: np.ndarray, count: int) -> bool:
    """Whether each of the last tokens is the best of one full pass over what precedes it."""
    best = np.argmax(model(text[None])[0], axis=-1)
    return best[-count - 1 : -1].tolist() == text[-count:].tolist()


@pytest.mark.parametrize("draft", [False, True])
def test_greedy_is_the_best_token_of_a_full_pass_however_rows_are_padded(model, draft):
    ids = prompt(3, 9)
    mask = np.ones_like(ids)
    mask[0, :4] = 0  # left
    mask[1, 6:] = 0  # right
    out = model.generate(ids, mask, max_new_tokens=30, draft=draft).numpy()

    np.testing.assert_array_equal(out[:, :9], ids)
    for row in range(3):
        text = np.concatenate([ids[row][mask[row] == 1], out[row, 9:]])
        assert is_greedy(model, text, 30)


@pytest.mark.parametrize("draft", [False, True])
def test_stock_operations_write_the_same_text(model, draft, monkeypatch):
    ids = prompt(3, 9)
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    out = model.generate(ids, mask, max_new_tokens=20, draft=draft)
    monkeypatch.setattr(ds_precision.choice, "kernels", lambda: None)
    stock = CausalLM(CONFIG)  # with compiled functions of its own
    stock.set_weights(model.get_weights())

    np.testing.assert_array_equal(stock.generate(ids, mask, max_new_tokens=20, draft=draft), out)


def test_drafts_are_accepted_and_save_rounds(model):
    model.generate(prompt(1, 5), max_new_tokens=64)
    plain = model.last_generation
    model.generate(prompt(1, 5), max_new_tokens=64, draft=True)
    drafted = model.last_generation

    assert (plain.new_tokens, plain.steps, plain.drafted) == (64, 63, 0)
    assert drafted.new_tokens == 64
    assert drafted.drafted == 2 * drafted.steps
    assert drafted.accepted > 0
    # Every round adds one token of the model's own beside what it accepts; the limit may cut
    # the last round's.
    assert drafted.steps + drafted.accepted - 63 in (0, 1)


def test_what_a_round_writes_beyond_the_limit_is_not_shown(model):
    for limit in (1, 2, 3, 7):
        out = model.generate(prompt(2, 4), max_new_tokens=limit, draft=True)
        assert out.shape == (2, 4 + limit)
        np.testing.assert_array_equal(out, model.generate(prompt(2, 4), max_new_tokens=limit))


@pytest.mark.parametrize("draft", [False, True])
def test_a_row_ends_at_its_end_token_and_is_filled(model, draft):
    ids = prompt(4, 6, seed=5)
    free = model.generate(ids, max_new_tokens=40).numpy()[:, 6:]
    end = int(np.bincount(free[:, 3:].ravel()).argmin())
    out = model.generate(ids, max_new_tokens=40, eos_token_id=end, draft=draft).numpy()[:, 6:]

    stops = [int(np.argmax(row == end)) if (row == end).any() else 39 for row in free]
    assert out.shape[1] == max(stops) + 1
    for row, (a, b) in enumerate(zip(free, out, strict=True)):
        np.testing.assert_array_equal(b[: stops[row] + 1], a[: stops[row] + 1])
        assert set(b[stops[row] + 1 :]) <= {end}


def test_config_names_the_end_token_and_the_filler(model):
    free = model.generate(prompt(2, 5), max_new_tokens=20).numpy()[:, 5:]
    end = int(free[0, 2])
    pad = (end + 1) % 6
    keras.utils.set_random_seed(3)
    ending = CausalLM(CONFIG.replace(eos_token_id=end, pad_token_id=pad))

    out = ending.generate(prompt(2, 5), max_new_tokens=20).numpy()[:, 5:]
    stop = int(np.argmax(free[0] == end))
    assert set(out[0, stop + 1 :]) <= {pad}
    never = ending.generate(prompt(2, 5), max_new_tokens=20, eos_token_id=())
    np.testing.assert_array_equal(never[:, 5:], free)


def test_drawn_text_follows_the_seed_and_drafting_keeps_its_distribution(model):
    ids = np.repeat(prompt(1, 4), 1000, axis=0)

    def second_token(draft: bool, seed: int) -> np.ndarray:
        out = model.generate(
            ids, max_new_tokens=3, temperature=1.5, top_p=0.95, seed=seed, draft=draft
        )
        return np.bincount(out.numpy()[:, 4 + 2], minlength=6) / len(ids)

    np.testing.assert_allclose(second_token(True, 1), second_token(False, 2), atol=0.07)
    np.testing.assert_array_equal(second_token(True, 1), second_token(True, 1))


def test_streamed_pieces_are_the_text(model):
    ids = prompt(2, 5)
    pieces = list(model.stream(ids, max_new_tokens=40))

    assert len(pieces) > 2
    whole = model.generate(ids, max_new_tokens=40)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole[:, 5:])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_ids": np.zeros([1, 0], int)}, r"input_ids has shape \(1, 0\)"),
        ({"input_ids": [[6]]}, "input_ids holds 6; tokens run from 0 to 5"),
        ({"input_ids": [[-1]]}, "input_ids holds -1"),
        ({"attention_mask": [[1]]}, r"attention_mask has shape \(1, 1\)"),
        ({"attention_mask": [[0, 0]]}, "a row without any token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_bad_arguments_are_named(model, change, named):
    with pytest.raises(ValueError, match=named):
        model.generate(**({"input_ids": [[1, 2]]} | change))


def test_drafting_needs_an_mtp_module():
    model = CausalLM(CONFIG.replace(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="no MTP module to draft with"):
        model.generate([[1]], draft=True)
