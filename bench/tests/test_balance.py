"""What is measured of balance, on loads whose evenness is known, and the page's table."""

import numpy as np
import pytest

from bench import balance
from bench.balance_report import table
from bench.marks import BEGIN, END


def test_evenness_of_known_loads():
    even, one = np.full(4, 8.0), np.array([32.0, 0.0, 0.0, 0.0])
    loads = np.array([[even, one]] * 30)
    found = balance.curves(loads)
    assert found["variation"] == [[0.0, 0.0], [pytest.approx(3**0.5, abs=1e-4)] * 2]
    assert found["max_violation"] == [[0.0, 0.0], [3.0, 3.0]]


def test_variants_differ_in_balance_alone():
    configs = [balance.config_of(name, 600, 0) for name in balance.VARIANTS]
    rest = [config.model_dump(exclude={"loss"}) for config in configs]
    assert all(other == rest[0] for other in rest)
    assert len({config.loss.model_dump_json() for config in configs}) == len(configs)


def test_the_table_counts_the_least_even_layer():
    run = {
        "variant": "bias",
        "seed": 0,
        "last_variation": [0.05, 0.25],
        "max_violation": [[1.0, 0.2], [1.0, 0.4]],
        "least": [0.9, 0.7],
        "bits_per_byte": 2.5,
    }
    lines = table({"bias": [run, run | {"seed": 1, "bits_per_byte": 2.6}]}).splitlines()
    assert lines[-1] == "| bias | 2 | 0.250 (not even) | 0.40 | 0.70 | 2.550 (2.500, 2.600) |"


def test_it_trains_what_is_missing_and_keeps_the_rest(monkeypatch, tmp_path):
    page = tmp_path / "phases" / "2-experts.md"
    page.parent.mkdir()
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    trained = []

    def train(variant, steps, seed):
        trained.append((variant, seed))
        curve = [[0.3, 0.1]]
        return balance.Run(
            variant=variant,
            seed=seed,
            steps=steps,
            max_violation=curve,
            variation=curve,
            last_variation=[0.1],
            least=[0.9],
            bits_per_byte=2.0,
        )

    monkeypatch.setattr(balance, "train", train)
    monkeypatch.setattr(balance, "packed", lambda _: ())
    balance.main(["--seeds", "1", "--out", str(tmp_path)])
    assert len(trained) == len(balance.VARIANTS)
    balance.main(["--seeds", "2", "--out", str(tmp_path)])
    assert len(trained) == 2 * len(balance.VARIANTS)
    text = page.read_text(encoding="utf-8")
    assert "| nothing | 2 | 0.100 | 0.10 | 0.90 | 2.000 (2.000, 2.000) |" in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert (tmp_path / "assets" / "balance.png").exists()
