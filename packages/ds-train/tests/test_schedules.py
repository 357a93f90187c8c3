"""Pipeline schedules: complete, free of deadlocks, and idle no longer than the paper says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_train.parallel import Costs, Exchange, Timetable, make_schedule, published_bubble
from ds_train.parallel.text import timetable_text


@st.composite
def schedules(draw):
    name = draw(st.sampled_from(["1f1b", "zb1p", "dualpipe", "dualpipev"]))
    ranks = draw(st.integers(1, 6))
    if not name.startswith("dualpipe"):
        return make_schedule(name, ranks, draw(st.integers(1, 20)))
    if name == "dualpipe":
        ranks += ranks % 2
    return make_schedule(name, ranks, 2 * ranks + 2 * draw(st.integers(0, 4)))


@given(schedules())
def test_each_micro_batch_passes_each_stage_once(schedule):
    done = [work for slots in schedule.ranks for slot in slots for work in slot]
    assert len(set(done)) == len(done)
    passed = [(work.stage, work.micro_batch) for work in done if work.kind == "F"]
    every = {(s, m) for s in range(schedule.stages) for m in range(schedule.micro_batches)}
    assert set(passed) == every
    assert len(passed) == len(every)
    back = [(work.stage, work.micro_batch) for work in done if work.kind in "BI"]
    assert sorted(back) == sorted(every)
    halves = [[w[1:] for w in done if w.kind == kind] for kind in "IW"]
    assert sorted(halves[0]) == sorted(halves[1])
    for rank, slots in enumerate(schedule.ranks):
        for work in (work for slot in slots for work in slot):
            assert schedule.rank_of(work.stage, work.direction) == rank


@given(schedules())
def test_ranks_that_do_one_thing_after_the_other_never_wait_for_ever(schedule):
    programs = schedule.programs()
    at = [0] * len(programs)
    arrived = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                item = program[at[rank]]
                if isinstance(item, Exchange):
                    # Both sides must be at it, and mean the same.
                    other = programs[item.peer][at[item.peer] :][:1]
                    if not (other and isinstance(other[0], Exchange) and other[0].peer == rank):
                        break
                    assert other[0].send == item.receive
                    assert other[0].receive == item.send
                    arrived |= {*item.send, *item.receive}
                    at[item.peer] += 1
                else:
                    for work in item:
                        for need in schedule.needs(work):
                            elsewhere = schedule.rank_of(need.stage, need.direction) != rank
                            kinds = "BI" if need.kind == "B" else need.kind
                            came = any(need._replace(kind=kind) in arrived for kind in kinds)
                            assert came or not elsewhere
                at[rank] += 1
                moved = True
    assert at == [len(program) for program in programs]


# F, B, W, F&B of the paper: W no longer than F and than the other half of B.
COSTS = [Costs(), Costs(1, 2, 1, 2.5), Costs(1, 2.2, 0.9, 2.6), Costs(1, 2, 0.6, 2.6)]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_idle_no_longer_than_published(name, ranks, costs):
    schedule = make_schedule(name, ranks, 2 * ranks + 4)
    found = Timetable.of(schedule, costs).bubble
    want = published_bubble(name, ranks, costs)
    assert found <= want + 1e-9
    if name in ("1f1b", "zb1p") or costs == Costs():
        assert found == pytest.approx(want)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_activations_held_as_published(ranks):
    held = {
        name: [
            make_schedule(name, ranks, 3 * ranks + ranks % 2).peak_activations(rank)
            for rank in range(ranks)
        ]
        for name in ("1f1b", "zb1p", "dualpipe", "dualpipev")
    }
    assert max(held["1f1b"]) == ranks
    assert held["zb1p"] == [ranks] * ranks
    assert held["dualpipe"] == [ranks + 1] * ranks
    assert held["dualpipev"] == [2 * ranks + 1] * ranks  # of 2P stages: half as many layers each


def test_dualpipe_is_the_order_of_the_papers_figure():
    """Figure 5: 8 ranks, 20 micro-batches in two directions; the first and the fourth rank."""
    schedule = make_schedule("dualpipe", 8, 20)

    def row(rank):
        """Name micro-batches of the rank's own end as they are, the others with a stroke."""
        strokes = ("'", "") if rank >= 4 else ("", "'")

        def named(work):
            return f"{work.kind}{work.micro_batch - 10 * work.direction}{strokes[work.direction]}"

        return ["&".join(map(named, slot)) for slot in schedule.ranks[rank]]

    assert row(0)[:10] == ["F0", "F1", "F2", "F3", "F4", "F5", "F6", "F0'", "I0'", "W0'"]
    assert row(0)[10:18] == ["F1'", "I1'", "W1'", "F2'", "I2'", "W2'", "F3'", "F7&B3'"]
    assert row(3)[:10] == ["F0", "F0'", "F1", "F1'", "F2", "F2'", "F3", "F3'", "F4", "B0'"]
    assert row(3)[10] == "F4'&B0"
    assert row(7)[:10] == row(0)[:10]  # both ends do the same


def test_the_text_shows_what_is_idle():
    costs = Costs()
    schedule = make_schedule("1f1b", 2, 3)
    lines = timetable_text(schedule, Timetable.of(schedule, costs), costs).splitlines()
    assert lines == ["  0 01..aa2bb.cc", "  1 .0aa1bb2cc.."]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (("gpipe", 4, 8), "schedule is 'gpipe'; it must be one of 1f1b, zb1p"),
        (("dualpipe", 3, 8), "dualpipe with 3 ranks and 8 micro-batches; it feeds both ends"),
        (("dualpipe", 4, 6), "dualpipe with 6 micro-batches; 4 ranks need 8 or more"),
        (("dualpipev", 4, 7), "dualpipev with 7 micro-batches; 4 ranks need 8 or more"),
        (("1f1b", 0, 7), "0 ranks and 7 micro-batches; both must be 1 or more"),
    ],
)
def test_numbers_that_do_not_fit(numbers, said):
    with pytest.raises(ValueError, match=said):
        make_schedule(*numbers)


def test_a_schedule_that_waits_for_itself_is_found():
    schedule = make_schedule("1f1b", 2, 2)
    first, second = schedule.ranks
    swapped = type(schedule)("1f1b", 2, 2, (first[::-1], second))
    with pytest.raises(ValueError, match="rank 0 waits for ever before B1@0"):
        Timetable.of(swapped, Costs())
