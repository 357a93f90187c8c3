import pytest

from bench.ratios import Spread, pair_order, speed_ratios


def test_a_ratio_is_taken_within_a_pair():
    # The machine was twice as slow at the second pair: the ratio does not see it.
    assert speed_ratios([(300, 100), (150, 50), (320, 100)]) == Spread(3.0, 3.0, 3.2)


def test_nothing_measured_is_no_figure():
    with pytest.raises(ValueError, match="at least 1"):
        Spread.of([])


@pytest.mark.parametrize("peers", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_order_changes_so_that_nobody_always_goes_first(peers):
    rounds = [pair_order(index, peers) for index in range(2 * len(peers))]
    for pairs in rounds:
        assert sorted(peer for peer, _ in pairs) == peers
    for peer in peers:
        firsts = [first for pairs in rounds for name, first in pairs if name == peer]
        assert sum(firsts) == len(firsts) / 2
    assert {pairs[0][0] for pairs in rounds} == set(peers)


def test_without_peers_there_is_nobody_to_pair_with():
    assert pair_order(3, []) == []
