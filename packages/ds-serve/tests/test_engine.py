"""The engine over the real model: texts are what each would be alone."""

import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

from conftest import SMALL, HeldSteps, Writer, tokens_of, wait_for
from ds_model import CausalLM
from ds_serve import Engine, EngineOptions
from ds_serve.engine import BusyError, ClosedError, Rules, Text


def prompts(model, *lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


def test_each_text_is_what_the_model_writes_alone(writer, model, greedy):
    asked = prompts(model, 3, 30, 17, 12, 1, 40, 9, 60)
    found = writer.write(*[(prompt, Rules(20)) for prompt in asked])
    assert found == [greedy(prompt, 20).tolist() for prompt in asked]


def test_shared_beginnings_are_read_once_and_change_nothing(writer, model, greedy):
    (shared,) = prompts(model, 24, seed=1)
    asked = [shared + tail for tail in prompts(model, 5, 9, 2, seed=2)]
    before = writer.engine.scheduler.cached_tokens
    found = [writer.write((prompt, Rules(8)))[0] for prompt in asked]
    assert found == [greedy(prompt, 8).tolist() for prompt in asked]
    assert writer.engine.scheduler.cached_tokens - before == 2 * 24


def test_a_cache_too_small_for_all_gives_the_same_texts(model, greedy):
    writer = Writer(Engine(model, EngineOptions(4, 8, 16, 4, cache_tokens=96)))
    asked = prompts(model, 20, 33, 25, 30, 28, seed=3)
    found = writer.write(*[(prompt, Rules(24)) for prompt in asked])
    assert found == [greedy(prompt, 24).tolist() for prompt in asked]
    assert writer.engine.scheduler.preemptions > 0
    writer.close()


def test_drafts_change_no_token(model, greedy):
    """Greedy and drawn, with shared beginnings, in a batch."""
    options = EngineOptions(4, 16, 16, 4, draft=True)
    drafting = Writer(Engine(model, options))
    plain = Writer(Engine(model, SMALL))
    (shared,) = prompts(model, 24, seed=4)
    asked = [shared + tail for tail in prompts(model, 5, 9, 2, 40, seed=5)]
    rules = [Rules(20), Rules(20, temperature=0.8, seed=3), Rules(20, temperature=1.2, seed=4)]
    for rule in rules:
        both = [one.write(*[(prompt, rule) for prompt in asked]) for one in (drafting, plain)]
        assert both[0] == both[1]
    assert both[0][0] != greedy(asked[0], 20).tolist()
    text, updates = drafting.begin(asked[0], rules[0])
    drafting.engine.submit([text])
    told = tokens_of(updates)
    assert text.drafts > 0
    assert sum(token.drafted for token in told) == text.accepted
    drafting.close()
    plain.close()


def test_a_module_that_is_right_saves_steps(model, greedy, monkeypatch):
    """A draft that is always right, made by reading ahead, halves the number of steps."""
    writer = Writer(Engine(model, EngineOptions(4, 8, 16, 4, draft=True)))
    (prompt,) = prompts(model, 10, seed=6)
    whole = greedy(prompt, 21).tolist()
    steps, run = [], writer.engine.steps.run

    def knowing(plan):
        results = run(plan)
        piece = plan.pieces[0]
        steps.append(len(piece.tokens))
        at = piece.start + len(piece.tokens) - piece.asks - len(prompt) + 1
        known = [[*whole, 0, 0][at + 1 + i] for i in range(piece.asks)]
        return results._replace(drafts=np.array(known, np.int32))

    monkeypatch.setattr(writer.engine.steps, "run", knowing)
    text, updates = writer.begin(prompt, Rules(21))
    writer.engine.submit([text])
    told = tokens_of(updates)
    assert [token.id for token in told] == whole
    assert text.accepted == text.drafts == sum(token.drafted for token in told) == 10
    assert steps == [10, *[2] * 10]
    writer.close()


def test_same_seed_same_text_whatever_else_runs(model):
    """More rows than the eight from which products are summed in another order."""
    writer = Writer(Engine(model, EngineOptions(12, 16, 40, 4)))
    asked = prompts(model, *range(5, 29, 2), seed=7)
    rules = [Rules(24, temperature=1.0, top_p=0.95, seed=i) for i in range(len(asked))]
    alone = [writer.write((prompt, rule))[0] for prompt, rule in zip(asked, rules, strict=True)]
    together = writer.write(*zip(asked, rules, strict=True))
    assert together == alone
    assert len({tuple(text) for text in alone}) == len(asked)
    writer.close()


NEAR = 2**-5  # of the largest logit: what two tokens that change places differ by at most


def test_in_bfloat16_texts_differ_at_near_ties_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    half = CausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    writer = Writer(Engine(half, EngineOptions(12, 16, 40, 4)))
    asked = prompts(model, *range(5, 29, 2), seed=17)
    alone = [writer.write((prompt, Rules(24)))[0] for prompt in asked]
    together = writer.write(*[(prompt, Rules(24)) for prompt in asked])
    for prompt, one, other in zip(asked, alone, together, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        at = next((i for i, (mine, theirs) in pairs if mine != theirs), None)
        if at is None:
            continue
        logits = half(np.array([prompt + one[:at]]))[0, -1].numpy()
        assert abs(logits[one[at]] - logits[other[at]]) <= NEAR * abs(logits).max()
    writer.close()


def test_rows_of_a_batch_are_equal_to_the_last_bits(model):
    """What the text's equality rests on: how far logits move with what else is in the step."""
    engine = Engine(model, EngineOptions(16, 8, 64, 4))
    asked = prompts(model, *[9] * 12, seed=8)

    def hidden(batch):
        found = {}
        writer = Writer(Engine(model, EngineOptions(16, 8, 200, 4)))
        begun = [writer.begin(prompt, Rules(0, hidden=True)) for prompt in batch]
        writer.engine.submit([text for text, _ in begun])
        for i, (_, updates) in enumerate(begun):
            found[i] = updates.get(timeout=60).hidden
        writer.close()
        return found

    alone = hidden(asked[:1])[0]
    together = hidden(asked)[0]
    np.testing.assert_allclose(together, alone, rtol=2e-5, atol=2e-5)
    assert engine.texts == 0


def test_several_answers_share_their_prompt(writer, model, greedy):
    (prompt,) = prompts(model, 22, seed=9)
    leader, first = writer.begin(prompt, Rules(10, temperature=1.0, seed=1))
    others = [
        writer.begin(prompt, Rules(10, temperature=1.0, seed=seed), leader=leader)
        for seed in (2, 3)
    ]
    same, last = writer.begin(prompt, Rules(10), leader=leader)
    writer.engine.submit([leader, *[text for text, _ in others], same])
    texts = [[token.id for token in tokens_of(u)] for u in (first, *[u for _, u in others], last)]
    assert texts[3] == greedy(prompt, 10).tolist()
    assert len({tuple(text) for text in texts}) == 4
    assert [text.cached for text, _ in others] == [21, 21]
    alone = [writer.write((prompt, Rules(10, temperature=1.0, seed=seed)))[0] for seed in (1, 2, 3)]
    assert texts[:3] == alone


def test_stock_operations_write_the_same(model, greedy, monkeypatch):
    asked = prompts(model, 3, 30, 17, 12, seed=10)
    expected = [greedy(prompt, 12).tolist() for prompt in asked]
    monkeypatch.setattr("ds_attention.mla.use_kernels", lambda *_: False)
    writer = Writer(Engine(model, EngineOptions(4, 8, 16, 4, cache_tokens=96, draft=True)))
    (text, first), (follower, second) = (
        writer.begin(asked[1], Rules(12)),
        writer.begin(asked[1], Rules(12)),
    )
    follower.leader = text
    writer.engine.submit([text, follower])
    for updates in (first, second):
        assert [token.id for token in tokens_of(updates)] == expected[1]
    assert writer.write(*[(prompt, Rules(12)) for prompt in asked]) == expected
    writer.close()


def test_log_probabilities_and_experts_are_those_of_the_whole_model(writer, model):
    (prompt,) = prompts(model, 13, seed=11)
    text, updates = writer.begin(prompt, Rules(9, logprobs=4, experts=True))
    writer.engine.submit([text])
    told = tokens_of(updates)
    output = model.forward(np.array([text.tokens[:-1]]))
    expected = tf.nn.log_softmax(output.logits[0]).numpy()
    at = np.arange(len(prompt) - 1, len(text.tokens) - 1)
    ids = [token.id for token in told]
    np.testing.assert_allclose([t.logprob for t in told], expected[at, ids], atol=2e-5)
    for place, token in zip(at, told, strict=True):
        order = np.argsort(-expected[place])[:4]
        assert [other for other, _ in token.alternatives] == order.tolist()
        for layer, routing in enumerate(output.routings):
            assert set(token.experts[layer]) == set(routing.indices.numpy()[place])


def test_the_last_hidden_state_is_the_models(writer, model):
    (prompt,) = prompts(model, 19, seed=12)
    h, _ = model.run_blocks(model.embed_tokens(np.array([prompt])))
    for _ in range(2):  # the second time most of it is in the cache
        text, updates = writer.begin(prompt, Rules(0, hidden=True))
        writer.engine.submit([text])
        update = updates.get(timeout=60)
        assert (update.finish_reason, update.tokens) == ("length", ())
        np.testing.assert_allclose(update.hidden, model.norm(h)[0, -1], atol=2e-5)


def test_small_weights_serve(model, tmp_path):
    model.save_pretrained(tmp_path)
    small = CausalLM.from_pretrained(tmp_path, quantize="fp8")
    writer = Writer(Engine(small, SMALL))
    asked = prompts(model, 3, 30, 17, seed=13)
    found = writer.write(*[(prompt, Rules(12)) for prompt in asked])
    assert found == [
        small.generate([p], max_new_tokens=12, eos_token_id=()).numpy()[0, len(p) :].tolist()
        for p in asked
    ]
    writer.close()


def test_nothing_is_traced_while_serving(model, monkeypatch):
    traced = []
    make = FuncGraph.__init__

    def counted(self, *args, **kwargs):
        traced.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(FuncGraph, "__init__", counted)
    writer = Writer(Engine(model, SMALL))
    assert traced  # the step's own
    list(writer.engine.warm_up())
    before = len(traced)
    asked = prompts(model, 3, 30, 17, 1, seed=14)
    rules = [
        Rules(6),
        Rules(6, temperature=0.5, top_k=3, logprobs=2),
        Rules(6, logit_bias={1: 2.0}, presence_penalty=1.0),
        Rules(6, repetition_penalty=1.3, temperature=1.0, top_p=0.5),
    ]
    writer.write(*zip(asked, rules, strict=True))
    assert len(traced) == before
    writer.close()


def test_warming_up_tells_how_far_it_is_and_leaves_the_cache_empty(model, greedy):
    engine = Engine(model, SMALL)
    shares = list(engine.warm_up())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    writer = Writer(engine)
    (prompt,) = prompts(model, 21, seed=15)
    assert writer.write((prompt, Rules(5)))[0] == greedy(prompt, 5).tolist()
    assert engine.scheduler.cached_tokens == 0
    writer.close()


def test_too_many_are_refused_and_told_when_to_come_back(held):
    engine, steps = held
    writer = Writer(engine)
    first, second = (writer.begin([1, 2], Rules(2)) for _ in range(2))
    engine.submit([first[0], second[0]])
    with pytest.raises(BusyError, match="1 requests are waiting already; try again in") as error:
        engine.submit([writer.begin([1], Rules(1))[0]])
    assert error.value.retry_after >= 1
    assert engine.texts == 2
    steps.permits.release(100)
    assert len(tokens_of(first[1])) == len(tokens_of(second[1])) == 2
    wait_for(lambda: engine.texts == 0)
    writer.close()


def test_the_cancelled_give_their_blocks_back_within_a_step(held):
    engine, steps = held
    writer = Writer(engine)
    text, updates = writer.begin([1] * 20, Rules(50))
    engine.submit([text])
    steps.permits.release(2)
    for _ in range(2):
        assert updates.get(timeout=30).finish_reason is None
    done = steps.done
    engine.cancel([text])
    steps.permits.release(1)  # for the step that may have begun
    while (update := updates.get(timeout=30)).finish_reason is None:
        pass
    assert update.finish_reason == "cancelled"
    assert steps.done <= done + 1
    assert engine.scheduler.pool.free == engine.scheduler.pool.blocks
    steps.permits.release(10)
    writer.close()


def test_a_step_that_fails_ends_its_texts_and_not_the_engine(model, greedy):
    engine = Engine(model, SMALL)
    writer = Writer(engine)
    (prompt,) = prompts(model, 21, seed=16)
    expected = greedy(prompt, 6).tolist()
    assert writer.write((prompt, Rules(6)))[0] == expected
    run = engine.steps.run

    def fail(_):
        raise ArithmeticError("no")

    engine.steps.run = fail
    with pytest.raises(ArithmeticError):
        writer.write((prompt, Rules(6)))
    engine.steps.run = run
    cached = engine.scheduler.cached_tokens
    assert writer.write((prompt, Rules(6)))[0] == expected
    assert engine.scheduler.cached_tokens == cached  # what a failed step may have touched is gone
    writer.close()


def test_a_fault_of_the_engine_is_told_to_all_and_nobody_waits(model, monkeypatch):
    engine = Engine(model, SMALL)
    writer = Writer(engine)
    monkeypatch.setattr(engine.scheduler, "plan", lambda _: 1 / 0)
    begun = [writer.begin([1, 2], Rules(3)) for _ in range(3)]
    engine.submit([text for text, _ in begun])
    for _, updates in begun:
        with pytest.raises(ZeroDivisionError):
            tokens_of(updates)
    assert engine.failed
    assert engine.texts == 0
    with pytest.raises(ClosedError):
        engine.submit([writer.begin([1], Rules(1))[0]])
    engine.close(60)  # and does not wait for what can't end


def test_closing_lets_what_runs_end(model):
    engine = Engine(model, SMALL)
    steps = HeldSteps(engine)
    writer = Writer(engine)
    text, updates = writer.begin([1, 2, 3], Rules(4))
    engine.submit([text])
    closer = threading.Thread(target=engine.close, args=(60,))
    closer.start()
    wait_for(lambda: not engine.open)
    with pytest.raises(ClosedError):
        engine.submit([writer.begin([1], Rules(1))[0]])
    steps.permits.release(100)
    assert len(tokens_of(updates)) == 4
    closer.join(30)
    assert not closer.is_alive()


def test_closing_without_grace_cancels(model):
    engine = Engine(model, SMALL)
    steps = HeldSteps(engine)
    writer = Writer(engine)
    text, updates = writer.begin([1, 2, 3], Rules(50))
    engine.submit([text])
    closer = threading.Thread(target=engine.close)
    closer.start()
    steps.permits.release(100)
    closer.join(30)
    reasons = []
    while not updates.empty():
        reasons.append(updates.get().finish_reason)
    assert reasons[-1] in {"cancelled", "length"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_running": 0}, "max_running is 0; it must be 1 or more"),
        ({"max_waiting": -1}, "max_waiting is -1; it must be 0 or more"),
        ({"block_size": 0}, "block_size is 0; it must be 1 or more"),
        ({"cache_tokens": 3}, "cache_tokens is 3; a block has 32"),
    ],
    ids=str,
)
def test_options_name_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        EngineOptions(**options)


def test_the_cache_is_as_large_as_it_says(model):
    engine = Engine(model, EngineOptions(2, 1, 16, 8, cache_tokens=100))
    assert engine.cache_tokens == 104
    c = model.config
    per_token = c.attention.cache_width * 4 * c.num_hidden_layers
    assert engine.steps.cache.nbytes == 104 * per_token
    pools = engine.steps.cache.pools
    assert sum(pool.numpy().nbytes for pool in pools) == engine.steps.cache.nbytes
    with pytest.raises(ValueError, match="the cache holds 104"):
        engine.submit([Text([1] * 100, Rules(5), lambda _: None)])
    default = EngineOptions(3, block_size=8)
    assert default.blocks(model) * 8 == 3 * c.max_position_embeddings
