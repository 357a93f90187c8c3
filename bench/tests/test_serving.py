"""The tables of serving, from figures that were made up here; and what one crowd is held to."""

import pytest

from bench.environments import PeerError
from bench.marks import BEGIN, END, begin
from bench.serving import Crowd, Found, Kept, note
from bench.serving_report import alone, capacities, crowds, drafted, endured, goals, publish


def crowd(speed, first):
    return Crowd(speed=[speed, speed], first=[first], late=[2 * first], between=[0.005])


def kept(speed, first, memory, start):
    crowds = {count: crowd(speed * count, first) for count in (1, 8, 32)}
    return Kept(crowds=crowds, memory=[memory << 30], start_seconds=[start])


def found():
    servers = {
        "ours": kept(200, 0.1, 1, 5.0),
        "vLLM": kept(100, 0.2, 4, 60.0),
        "llama-server": kept(220, 0.3, 1, 0.1),
        "transformers": Kept(crowds={8: Crowd(speed=[50.0])}),
    }
    one = {"accepted": 0.5, "without": 100.0, "with": 130.0, "same": True}
    return Found(
        machine={"processor": "one of ours", "processors": "2"},
        peers={"bfloat16": servers},
        engine={
            "together": {"clients": 8, "in turn": 150.0, "together": 500.0},
            "prefix": {"shared": 2048, "cold": 0.4, "warm": 0.02},
            "overhead": [
                {
                    "clients": 1,
                    "step": 0.0045,
                    "bare": 0.004,
                    "handed": 0.0046,
                    "outside_graph": 0.02,
                }
            ],
        },
        drafts={"1": {"clients": 1, "greedy": one, "drawn": one}},
        endurance={
            "requests": 10000,
            "ended": {"stop": 0, "length": 7000, "cancelled": 3000},
            "memory_mib": [800, 801],
            "all_blocks_free": True,
            "faults": 0,
            "preemptions": 5,
            "seconds": 60.0,
        },
    ).model_dump()


def test_goals_say_what_is_met():
    rows = [line.split(" | ") for line in goals(found()).splitlines()[2:]]
    met = {row[0].strip("| "): (row[1], row[2].strip("| ")) for row in rows}
    assert met["bfloat16, 1 clients: tokens/s, 1.0 of llama-server"] == ("0.91", "missed")
    assert met["bfloat16, 8 clients: tokens/s, 1.1 of vLLM"] == ("2.00", "met")
    assert met["bfloat16, 32 clients: first token not above vLLM's"] == ("0.50 of it", "met")
    assert met["bfloat16: memory, a third of vLLM's"] == ("1.0 of 4.0 GiB", "met")
    assert met["bfloat16: start-up, a tenth of vLLM's"] == ("5.0 of 60.0 s", "met")
    assert met["first token, 2048 shared tokens: 10 times sooner"] == ("20.0 times", "met")
    assert met["a step of 1 clients: below 10% above the bare graph"] == ("12%", "missed")


def test_tables_have_a_row_for_each_server_and_crowd():
    assert len(crowds(found()).splitlines()) == 4 + 3 * 3 + 1
    assert "| bfloat16 | 8 | transformers | 50 |  |  |  |" in crowds(found())
    assert "| 1 clients, greedy | 50% | 100 | 130 | 1.30 | yes |" in drafted(found())
    assert "7,000 length" in endured(found())
    assert "starts a step's operations, 1 clients | 4.6 ms | 4.0 ms |" in alone(found())
    assert "14,800" in capacities()


def test_pages_are_written_between_their_marks(tmp_path):
    for folder in ("phases", "how-to", "assets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "phases" / "6-serving.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    deploy = tmp_path / "how-to" / "deploy.md"
    deploy.write_text(f"{begin('capacity')}\n{END}\n")
    publish(found(), tmp_path)
    text = (tmp_path / "phases" / "6-serving.md").read_text()
    assert "old" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert (tmp_path / "assets" / "serving.png").stat().st_size > 1000
    publish(Found().model_dump(), tmp_path)
    assert "Nothing is measured yet." in (tmp_path / "phases" / "6-serving.md").read_text()


def test_a_run_that_lacks_tokens_is_no_run():
    run = {"tokens": 2 * 128, "seconds": 2.0, "first": [0.1, 0.3], "between": [0.01, 0.02]}
    one = Crowd()
    note(one, run, 2)
    assert (one.speed, one.late, one.between) == ([128.0], [0.1], [0.015])
    with pytest.raises(PeerError, match="256 tokens came of 384"):
        note(one, run, 3)
