"""The scheduler against a model of its own: each text ends as it would alone; no block is lost.

A token is chosen by what the text holds in the blocks that it names, as a model would; so a wrong
block, a lost copy or a skipped token gives another text.
"""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ds_serve.engine.blocks import BlockPool
from ds_serve.engine.scheduler import FEW, Scheduler
from ds_serve.engine.text import Rules, Text

BLOCK = 4


def next_token(tokens):
    """What follows a text: any function of all its tokens."""
    return hash(tuple(tokens)) % 5


def written_alone(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens


class Memory:
    """What lies in the blocks, and a step that reads and writes there and nowhere else."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.slots = {}

    def step(self, now=0.0, guess=lambda _: None):
        plan = self.scheduler.plan(now)
        for old, new in plan.copies:
            for i in range(BLOCK):
                self.slots[new, i] = self.slots.get((old, i))
        counts = [len(piece.tokens) for piece in plan.pieces]
        assert sorted(counts, key=lambda n: n > FEW) == counts
        assert sum(counts) <= self.scheduler.step_tokens
        writers = Counter()
        for text, start, tokens, _ in plan.pieces:
            for i, token in enumerate(tokens):
                place = text.blocks[(start + i) // BLOCK], (start + i) % BLOCK
                self.slots[place] = token
                writers[place] += 1
        assert all(count == 1 for count in writers.values())  # nobody writes where another does
        ended = []
        for piece in plan.pieces:
            text, start, tokens, asks = piece
            seen = [
                self.slots[text.blocks[i // BLOCK], i % BLOCK] for i in range(start + len(tokens))
            ]
            chosen = [next_token(seen[: len(seen) - asks + 1 + i]) for i in range(asks)]
            self.scheduler.advance(piece, chosen)
            text.draft = guess(text) if asks else None
            if text.finish_reason is not None:
                self.scheduler.leave(text)
                ended.append(text)
        self.scheduler.check()
        return ended


def text(prompt, count=6, heard=None, **more):
    return Text(
        prompt, Rules(count), lambda update: heard is not None and heard.append(update), **more
    )


def run(scheduler, texts, guess=lambda _: None, most=500, memory=None):
    memory = memory or Memory(scheduler)
    for one in texts:
        scheduler.add(one)
    for _ in range(most):
        memory.step(guess=guess)
        if not (scheduler.waiting or scheduler.running):
            return
    raise AssertionError("the texts do not end")


def expect_all(texts):
    for one in texts:
        assert one.tokens == written_alone(one.prompt, one.rules.max_tokens)


def test_texts_share_steps_and_prompts_come_in_pieces():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=3, step_tokens=10)
    texts = [text(list(range(n))) for n in (3, 25, 9, 1, 40)]
    run(scheduler, texts)
    expect_all(texts)
    assert scheduler.preemptions == 0


def test_a_long_prompt_does_not_stall_the_others():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=3, step_tokens=10)
    memory, short, long = Memory(scheduler), text([1, 2], 30), text(list(range(90)), 2)
    scheduler.add(short)
    memory.step()
    scheduler.add(long)
    for _ in range(9):
        before = short.written
        memory.step()
        assert short.written == before + 1
    assert 0 < long.unread < 90


def test_texts_that_do_not_fit_together_take_turns():
    scheduler = Scheduler(BlockPool(10), BLOCK, max_running=4, step_tokens=16)
    texts = [text(list(range(i, i + 6)), 22) for i in range(4)]
    run(scheduler, texts)
    expect_all(texts)
    assert scheduler.preemptions > 0


def test_what_could_never_fit_is_refused():
    scheduler = Scheduler(BlockPool(4), BLOCK, max_running=2, step_tokens=8)
    with pytest.raises(
        ValueError, match="prompt and answer have up to 17 tokens; the cache holds 16"
    ):
        scheduler.add(text(list(range(10)), 7))
    scheduler.add(text(list(range(10)), 6))


def test_a_step_must_have_room_for_all_that_run():
    with pytest.raises(
        ValueError, match="step_tokens is 7; with 4 texts at once it must be at least 8"
    ):
        Scheduler(BlockPool(4), BLOCK, max_running=4, step_tokens=7)


def test_a_prefix_is_read_once():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=4, step_tokens=100)
    shared = list(range(21))
    memory = Memory(scheduler)
    run(scheduler, [text([*shared, 1])], memory=memory)
    late = [text([*shared, 2]), text([*shared[:9], 3]), text(shared)]
    run(scheduler, late, memory=memory)
    expect_all(late)
    assert [one.cached for one in late] == [20, 8, 20]
    assert scheduler.cached_tokens == 48


def test_answers_to_one_prompt_share_its_blocks_until_they_write():
    for length in (7, 8, 9):
        scheduler = Scheduler(BlockPool(64), BLOCK, max_running=4, step_tokens=100)
        leader = text(list(range(50, 50 + length)), 9)
        followers = [text(leader.prompt, 9, leader=leader) for _ in range(3)]
        memory = Memory(scheduler)
        for one in (leader, *followers):
            scheduler.add(one)
        memory.step()
        assert not any(follower.blocks for follower in followers)
        memory.step()
        whole = (length - 1) // BLOCK
        for follower in followers:
            assert follower.blocks[:whole] == leader.blocks[:whole]
            assert follower.blocks[whole] != leader.blocks[whole]
            assert follower.cached == length - 1
        while scheduler.running or scheduler.waiting:
            memory.step()
        expect_all([leader, *followers])


def test_followers_of_one_that_left_read_for_themselves():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=1, step_tokens=100)
    leader = text(list(range(9)), 3)
    followers = [text(leader.prompt, 4, leader=leader) for _ in range(2)]
    run(scheduler, [leader, *followers])
    expect_all([leader, *followers])


def test_priority_goes_before_arrival():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=1, step_tokens=100)
    order = []
    texts = [text([i], 2, priority=p) for i, p in enumerate((0, 5, -1, 0))]
    memory = Memory(scheduler)
    for one in texts:
        scheduler.add(one)
    while scheduler.running or scheduler.waiting:
        order += [one.prompt[0] for one in memory.step()]
    assert order == [2, 0, 3, 1]


def test_the_cancelled_and_the_late_leave_before_the_next_step():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=2, step_tokens=100)
    memory, heard = Memory(scheduler), []
    gone, late, waits = text([1], 50, heard), text([2], 50, heard, deadline=7.0), text([3], 5)
    for one in (gone, late, waits):
        scheduler.add(one)
    memory.step(now=1.0)
    gone.cancelled = True
    memory.step(now=2.0)
    assert [update.finish_reason for update in heard] == ["cancelled"]
    assert not gone.blocks
    memory.step(now=7.0)
    assert [update.finish_reason for update in heard] == ["cancelled", "timeout"]
    assert scheduler.running == [waits]


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_drafts_change_the_number_of_steps_and_not_the_text(right):
    def guess(one):
        true = next_token(one.tokens)
        return true if hash((one.written, 3)) % 10 < 10 * right else true + 7

    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=3, step_tokens=20)
    texts = [text(list(range(n)), 13) for n in (3, 12, 7)]
    run(scheduler, texts, guess)
    expect_all(texts)
    accepted = sum(one.accepted for one in texts)
    drafts = sum(one.drafts for one in texts)
    assert drafts > 0
    assert (accepted == drafts, accepted == 0) == (right == 1.0, right == 0.0)


def test_no_end_is_passed_by_a_draft():
    scheduler = Scheduler(BlockPool(64), BLOCK, max_running=1, step_tokens=20)
    whole = written_alone([4, 4], 12)
    end = whole[7]
    one = Text([4, 4], Rules(12, ends=frozenset({end})), lambda _: None)
    run(scheduler, [one], guess=lambda one: next_token(one.tokens))
    assert one.tokens == whole[: whole.index(end, 2) + 1]
    assert one.finish_reason == "stop"


def test_few_tokens_are_as_many_as_attention_says():
    """The scheduler sorts by it and may not import TensorFlow, so the number stands there too."""
    from ds_attention import MultiHeadLatentAttention  # noqa: PLC0415 - brings TensorFlow

    assert FEW == MultiHeadLatentAttention.FEW


class Server(RuleBasedStateMachine):
    """Requests that come, go, share beginnings and are guessed ahead, in little memory."""

    @initialize(blocks=st.integers(8, 20), running=st.integers(1, 4), width=st.integers(8, 24))
    def start(self, blocks, running, width):
        self.scheduler = Scheduler(BlockPool(blocks), BLOCK, running, max(width, 2 * running))
        self.memory, self.texts, self.now = Memory(self.scheduler), [], 0.0

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        count=st.integers(1, 14),
        answers=st.integers(1, 3),
        priority=st.integers(-1, 1),
        patience=st.none() | st.integers(1, 30),
    )
    def ask(self, prompt, count, answers, priority, patience):
        leader = None
        for _ in range(answers):
            deadline = None if patience is None else self.now + patience
            one = text(prompt, count, priority=priority, deadline=deadline, leader=leader)
            leader = leader or one
            self.scheduler.add(one)
            self.texts.append(one)

    @precondition(lambda self: any(one.finish_reason is None for one in self.texts))
    @rule(data=st.data())
    def give_up(self, data):
        left = [one for one in self.texts if one.finish_reason is None]
        data.draw(st.sampled_from(left)).cancelled = True

    @rule(steps=st.integers(1, 6), luck=st.integers(0, 3))
    def work(self, steps, luck):
        for _ in range(steps):
            self.now += 1
            self.memory.step(
                self.now, lambda one: next_token(one.tokens) if (one.written + luck) % 3 else 9
            )

    @invariant()
    def books_balance_and_texts_are_their_own(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        for one in self.texts:
            assert one.tokens == written_alone(one.prompt, one.written)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not (self.scheduler.waiting or self.scheduler.running):
                break
            self.work(1, 0)
        assert all(one.finish_reason is not None for one in self.texts)
        assert self.scheduler.pool.free == self.scheduler.pool.blocks


TestServer = Server.TestCase
TestServer.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
