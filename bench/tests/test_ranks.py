"""The bytes that have to be sent, against counting by hand, and the page's tables."""

import pytest

from bench import ranks
from bench.marks import BEGIN, END, begin
from bench.ranks_report import held_table, plan_figures, publish, table
from ds_model import parameters_by_part


def config(**mesh):
    return ranks.config_of({"accumulation": 1, **mesh}, 3)


def test_two_replicas_send_each_gradient_twice():
    parts = parameters_by_part(config().model.build())
    whole = sum(part.shared + part.experts for part in parts.values())
    assert ranks.least_bytes(config()) == 0
    assert ranks.least_bytes(config(dp=2)) == 4 * 2 * whole
    assert ranks.least_bytes(config(dp=4)) == 4 * 6 * whole


def test_experts_on_two_ranks_take_tokens_there_and_back():
    found = config(ep=2)
    model = found.model.build()
    shared = sum(part.shared for part in parameters_by_part(model).values())
    layers, tokens = 3, 8 * 256
    # Two of four groups, two a rank: both on one rank with chance 1/2, so 1.5 ranks, half of them
    # the token's own; here by independent draws.
    copies = 2 * (1 - 0.5**2) / 2
    rows = 4 * layers * tokens * copies * model.hidden_size
    assert ranks.least_bytes(found) == pytest.approx(4 * (2 * shared + rows))


def test_a_cut_is_crossed_once_each_way():
    tokens, hidden = 8 * 256, 256
    for schedule, cuts in (("1f1b", 1), ("zb1p", 1), ("dualpipev", 2)):
        found = config(pp=2, schedule=schedule, accumulation=4)
        assert ranks.least_bytes(found) == 4 * 2 * cuts * tokens * hidden


def test_idle_shares_are_the_formulas():
    assert ranks.idle_share(config()) == 0
    assert ranks.idle_share(config(pp=2, accumulation=4)) == pytest.approx(3 / 15)
    zb = config(pp=2, schedule="zb1p", accumulation=4)
    assert ranks.idle_share(zb) == pytest.approx(1 / 13)


def point(mesh, **changes):
    values = {
        "mesh": mesh,
        "ranks": 1,
        "step_seconds": 1.0,
        "processor_seconds": 2.0,
        "bytes": 0.0,
        "least_bytes": 0.0,
        "first_seconds": 9.0,
        "bubble": 0.0,
    }
    return values | changes


def test_a_mesh_stands_beside_one_process(tmp_path):
    pipeline = {"ranks": 2, "step_seconds": 1.5, "processor_seconds": 2.4, "bubble": 0.2}
    points = [
        point("one process"),
        point("one process, 4 micro-batches", step_seconds=1.2),
        point("pp2, 1F1B", bytes=3 * 2**20, least_bytes=2 * 2**20, **pipeline),
    ]
    last = table(points).splitlines()[-1]
    assert last == (
        "| pp2, 1F1B | 2 | 1.500 | 1.25 | 2.400 | 1.20 | 20% / 20% | 3.0 | 1.50 | 9.0 |"
    )
    sizes = {"expected": 2e6, "tensors": 2.2e6, "measured": 2.4e6}
    held = [{"schedule": "1f1b", "rank": 0, "in_flight": 2, **sizes}]
    assert held_table(held).splitlines()[-1] == "| 1f1b | 0 | 2 | 1.9 | 2.1 | +10% | 2.3 | +20% |"
    page = tmp_path / "phases" / "3-distribution.md"
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\nold\n{END}\n{begin('the plan')}\nold\n{END}", encoding="utf-8")
    publish({"points": points, "held": held, "here": None}, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.index("1F1B") < text.index("Kimi K2")


def test_the_search_finds_the_papers_layout():
    said = plan_figures({"planned": 2.3, "measured": 2.4})
    assert "pp 16 x ep 64 x dp 2, dualpipe, recompute parts" in said
    assert "planned to take 2.30 s, and took 2.40 s" in said
