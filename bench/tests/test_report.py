from bench import report
from bench.tables import limits_table
from bench.targets import Target


def line(text, start):
    return next(row for row in text.splitlines() if row.startswith(start))


def test_a_row_shows_all_that_was_found(found, config):
    row = line(report.page(found, config, {}), "| prefill, 1 x 512, float32 |")
    assert row == (
        "| prefill, 1 x 512, float32 | 6,000 | 2,000 (eager, grouped_mm) | 6,500 (vLLM) "
        "| 3.00 (2.90 to 3.10) | 0.92 (0.82 to 1.02) | 54% "
        "| short: 0.92 of the best peer for 1.00; 54% of the limit for 57% |"
    )


def test_what_is_missing_says_why(found, config):
    text = report.page(found, config, {})
    row = line(text, "| decode, batch 1, 512 before, 8-bit weights |")
    assert row.endswith("| ours: no such weights yet |")
    assert "- ours, int8: no such weights yet" in text


def test_a_peer_that_failed_at_a_row_says_why(found, config):
    failed = (
        found.rows[0]
        .systems["vLLM"]
        .model_copy(
            update={"mode": None, "speed": None, "ratio": None, "tried": {"run": "out of memory"}}
        )
    )
    found.rows[0].systems["vLLM"] = failed
    text = report.page(found, config, {})
    assert "- vLLM, prefill, 1 x 512, float32: out of memory" in text
    assert "| 2,000 (transformers) |" in line(text, "| prefill, 1 x 512, float32 |")


def test_a_disagreement_is_shown(found, config):
    text = report.page(found, config, {})
    assert "| vLLM | float32 | 2e-06 | 8 of 8 | 3 of 32 | - | - |" in text


def test_notes_stand_under_their_row(found, config):
    notes = {"prefill-1x512-float32": "Padding was tried.", "general": "Read this first."}
    text = report.page(found, config, notes)
    assert "**prefill, 1 x 512, float32.** Padding was tried." in text
    assert text.index("Read this first.") < text.index("Padding was tried.")


def test_notes_are_read_by_heading(tmp_path):
    file = tmp_path / "notes.md"
    file.write_text("# For writers\n\nHow to.\n\n## a\n\nOne.\n\n- two\n\n## b\n")
    assert report.read_notes(file) == {"a": "One.\n\n- two", "b": ""}


def test_a_target_is_met_or_short_by_so_much():
    target = Target(2.0, 1.0, 0.5)
    assert report.verdict(target, 2.0, 1.1, 0.5) == "met"
    assert report.verdict(target, 1.5, 1.1, 0.4) == (
        "short: 1.50 of transformers for 2.00; 40% of the limit for 50%"
    )
    assert report.verdict(target, 2.5, None, 0.6) == "not measured: of the best peer"
    assert report.verdict(Target(best=1.0), None, 1.0, None) == "met"
    assert report.verdict(None, 9.0, 9.0, 1.0) == "-"


def test_the_best_peer_is_never_us(found):
    assert report.best_peer(found.rows[0]) == "vLLM"
    assert report.best_peer(found.rows[0].model_copy(update={"systems": {}})) is None


def test_what_was_found_survives_the_file(found):
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_limits_have_units(found):
    text = limits_table(found)
    assert "| float32 products, 2048 x 2048 x 2048 | 490 GFLOP/s |" in text
    assert "| reads of 1 GiB, past every cache | 79 GB/s |" in text
