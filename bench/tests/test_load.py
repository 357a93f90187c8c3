from bench.load import TICKS, parse_busy, parse_process


def test_the_session_and_time_of_a_process_whose_name_holds_a_bracket():
    stat = "4242 (a) b) R 1 4242 77 0 -1 4194560 1 2 3 4 " + f"{5 * TICKS} {2 * TICKS} {TICKS} 0 20"
    assert parse_process(stat) == (77, 8.0)


def test_waiting_is_not_work():
    # user nice system idle iowait irq softirq steal
    stat = (
        f"cpu  {TICKS} {TICKS} {TICKS} {900 * TICKS} {80 * TICKS} 0 {TICKS} {TICKS} 0 0\ncpu0 1 2"
    )
    assert parse_busy(stat) == 5.0
