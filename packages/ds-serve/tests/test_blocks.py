"""The pool of blocks: who holds what, what is found again, what is given out first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_serve.engine.blocks import ROOT, BlockPool, NoBlockError, block_key


def keys(*texts):
    found = [ROOT]
    for text in texts:
        found.append(block_key(found[-1], [ord(c) for c in text]))
    return found[1:]


def test_a_key_tells_all_tokens_before_its_end():
    assert keys("ab", "cd") == keys("ab", "cd")
    assert keys("ab", "cd")[1] != keys("xb", "cd")[1]
    assert keys("ab", "cd")[0] == keys("ab", "ce")[0]
    assert len({*keys("a", "b", "c"), *keys("ab", "c"), *keys("abc")}) == 6


def test_free_blocks_go_out_least_recently_used_first_and_those_without_text_before():
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    with pytest.raises(NoBlockError, match="all 4 blocks are held"):
        pool.take()
    names = keys("a", "b", "c")
    for block, key in zip(blocks, names, strict=False):
        pool.publish(block, key)
    pool.release(blocks[:2])  # of a text the last block goes first
    pool.release(blocks[2:])  # the fourth has no text
    assert pool.find(names) == blocks[:3]
    assert [pool.take() for _ in range(4)] == [blocks[3], blocks[1], blocks[0], blocks[2]]
    assert pool.find(names) == []


def test_what_is_found_can_be_held_and_is_not_given_out():
    pool = BlockPool(2)
    first, key = pool.take(), keys("a")[0]
    pool.publish(first, key)
    pool.release([first])
    pool.hold(first)
    pool.hold(first)
    assert pool.shared(first)
    second = pool.take()
    assert second != first
    with pytest.raises(NoBlockError):
        pool.take()
    pool.check([[first], [first, second]])


def test_the_same_text_twice_is_found_once():
    pool = BlockPool(2)
    one, two, key = pool.take(), pool.take(), keys("a")[0]
    pool.publish(one, key)
    pool.publish(two, key)
    assert pool.find([key]) == [one]
    pool.release([two])
    assert pool.take() == two
    pool.check([[one], [two]])


@given(
    st.lists(st.sampled_from(["take", "release", "hold", "publish", "forget"]), max_size=60),
    st.data(),
)
def test_the_books_balance_whatever_happens(actions, data):
    pool, held, serial = BlockPool(5), [], 0
    for action in actions:
        match action:
            case "take":
                if pool.free:
                    held.append(pool.take())
                else:
                    with pytest.raises(NoBlockError):
                        pool.take()
            case "release" if held:
                pool.release([held.pop(data.draw(st.integers(0, len(held) - 1)))])
            case "hold" if held:
                held.append(data.draw(st.sampled_from(held)))
                pool.hold(held[-1])
            case "publish" if held:
                serial += 1
                pool.publish(data.draw(st.sampled_from(held)), bytes([serial % 3]))
            case "forget":
                pool.forget_all()
                assert pool.cached == 0
        pool.check([[block] for block in held])


def test_a_lost_block_is_noticed():
    pool = BlockPool(2)
    block = pool.take()
    with pytest.raises(AssertionError, match="held"):
        pool.check([])
    pool.release([block])
    pool.check([])
