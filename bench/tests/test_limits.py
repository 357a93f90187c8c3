from bench.limits import TRIES, WARM_UP, best_rate, combine


def test_a_limit_is_the_highest_that_anybody_reached():
    found = combine([{"gemm": 10.0, "read": 5.0}, {"gemm": 12.0}, {"read": 4.0}])
    assert found == {"gemm": 12.0, "read": 5.0}


def test_warm_up_is_not_counted():
    rates = iter([900.0] * WARM_UP + [float(rate) for rate in range(TRIES)])
    assert best_rate(lambda: next(rates)) == TRIES - 1
