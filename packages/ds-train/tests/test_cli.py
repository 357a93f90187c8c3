"""The command line on real text: a whole run, run again, and what it refuses."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from conftest import MODEL
from ds_model import CausalLM, Tokenizer, parameters_by_part
from ds_train import TrainConfig, quickstart_config, training_memory
from ds_train.cli import app
from ds_train.data import state_of_the_union
from ds_train.parallel.launch import _environments

runner = CliRunner()
CONFIG = f"""
[model]
{"".join(f"{key} = {value!r}{chr(10)}" for key, value in MODEL.items())}
[data]
sequence_length = 16
held_out = 0.2
suffixes = [".txt"]
[schedule]
peak = 1e-2
warmup_steps = 5
constant_until = 0.5
[train]
steps = 30
batch_size = 8
[checkpoint]
every = 10
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a finished run, its data and config, and what it printed."""
    root = tmp_path_factory.mktemp("cli")
    (root / "data").mkdir()
    for document in state_of_the_union()[:5]:
        text = document.text[:6000].replace("Government", "government")
        (root / "data" / f"{document.name}.txt").write_text(text)
    (root / "data" / "picture.txt").write_bytes(b"\0\1\2")
    (root / "train.toml").write_text(CONFIG)
    return root, pretrain(root)


def pretrain(root, *more):
    arguments = ["--config", root / "train.toml", "--data", root / "data", "--out", root / "out"]
    return runner.invoke(app, ["pretrain", *map(str, arguments), *more])


def test_a_run_leaves_a_model_that_opens_again(run):
    root, result = run
    assert result.exit_code == 0, result.output
    assert "skipped 1 binary" in result.stderr
    model = CausalLM.from_pretrained(root / "out" / "model")
    tokenizer = Tokenizer.from_pretrained(root / "out" / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert {path.name for path in (root / "out" / "plots").iterdir()} == {
        "loss.png",
        "expert_load.png",
        "routing.png",
    }


def test_the_report_stands_beside_the_yardsticks(run):
    root, result = run
    report = json.loads((root / "out" / "report.json").read_text())
    held = max((root / "data").glob("17*.txt")).read_bytes()
    assert report["bytes"] == len(held.strip())
    assert report["documents"] == 1
    for name in ("model", "unigram", "ngram", "xz"):
        assert f"{report[name]:.3f}" in result.stdout
    # Thirty steps beat knowing nothing (every token equally likely), and not the 5-gram.
    assert report["ngram"] < report["model"] < report["tokens"] * 8.23 / report["bytes"]
    assert "does not beat every yardstick" in result.stdout


def test_run_again_it_has_nothing_to_do_and_says_the_same(run):
    root, first = run
    again = pretrain(root, "--json")
    assert again.exit_code == 0, again.output
    found = json.loads(again.stdout)
    assert found["steps"] == 30
    assert found["report"] == {
        key: value
        for key, value in json.loads((root / "out" / "report.json").read_text()).items()
        if key != "checkpoint"
    }
    assert all(sample["identical"] for sample in found["samples"])
    for way in ("text", "drawn"):  # drawn with a fixed seed
        assert found["samples"][0][way].split()[0] in first.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[train]\nsteps = 0\n", "[train] steps = 0: should be greater than 0"),
        ('[data]\nsuffixes = [".md"]\n', "no text to train on"),
        ("[model]\nvocab_size = 100\n", "vocab_size is 100; it must be at least 264"),
        ("[nonsense]\n", "[nonsense]: unknown key"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, change, said):
    root, _ = run
    (tmp_path / "bad.toml").write_text(change)
    arguments = ["pretrain", "--config", tmp_path / "bad.toml", "--data", root / "data"]
    result = runner.invoke(app, [*map(str, arguments), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ds-train: ")
    assert said in last


def test_a_broken_checkpoint_is_one_line_and_exit_code_2(run):
    root, _ = run
    path = root / "out" / "checkpoints" / "step-00000030" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    result = pretrain(root)
    path.write_bytes(whole)
    assert result.exit_code == 2
    assert "model.safetensors has 1000 bytes" in result.stderr
    assert "go on from step 20" in result.stderr


def test_the_printed_config_is_valid_and_complete(tmp_path):
    result = runner.invoke(app, ["init-config"])
    path = tmp_path / "train.toml"
    path.write_text(result.stdout)
    config = TrainConfig.from_file(path)
    dumped = config.model_dump()
    for table, values in dumped.items():
        assert f"[{table}]" in result.stdout
        for key in values:
            assert f"\n{key} = " in result.stdout


def test_a_schedule_is_shown_with_what_the_paper_says_of_it(tmp_path):
    arguments = ["schedule", "--pp", "8", "--microbatches", "20", "--plot", str(tmp_path / "a.png")]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines[:8]) == 8
    assert lines[0].startswith("  0 0123456")
    assert lines[8] == "66 in all, idle at most 6 (9.1%); the paper's formula gives 6"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    bad = runner.invoke(app, ["schedule", "--pp", "3"])
    assert bad.exit_code == 2
    assert "both must be even" in bad.stderr


def test_launch_wants_as_many_processes_as_ranks(run):
    root, _ = run
    arguments = ["launch", "--config", root / "train.toml", "--data", root / "data", "--nproc", "3"]
    result = runner.invoke(app, [*map(str, arguments), "--dp", "2", "--out", str(root / "many")])
    assert result.exit_code == 2
    assert "--nproc is 3; pp x ep x dp is 1 x 1 x 2 = 2" in result.stderr


@pytest.mark.ranks
def test_launch_trains_on_ranks_and_ends_as_one_process_does(run):
    root, _ = run
    arguments = ["launch", "--config", root / "train.toml", "--data", root / "data", "--nproc", "2"]
    arguments += ["--pp", "2", "--out", root / "many"]
    result = runner.invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert "pipeline 1 of 2" in result.stderr
    found = json.loads(result.stdout)["report"]
    alone = json.loads((root / "out" / "report.json").read_text())
    assert found["model"] == pytest.approx(alone["model"], rel=1e-4)
    assert (root / "many" / "model" / "model.safetensors").exists()


@pytest.mark.ranks
def test_a_scheduler_starts_the_command_once_a_rank(run):
    root, _ = run
    words = ["launch", "--config", root / "train.toml", "--data", root / "data", "--dp", "2"]
    command = [sys.executable, "-c", "from ds_train.cli import main; main()", *map(str, words)]
    processes = [
        subprocess.Popen(  # noqa: S603 - ourselves
            [*command, "--out", str(root / "scheduled")],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in _environments(2)
    ]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for rank, output in enumerate(said):
        assert f"rank {rank} of 2" in output
    assert (root / "scheduled" / "checkpoints" / "step-00000030").exists()


def test_the_quickstart_refuses_a_bad_step_count():
    result = runner.invoke(app, ["quickstart", "--steps", "0"])
    assert result.exit_code == 2
    assert "[train] steps = 0" in result.stderr
    assert quickstart_config(300).train.steps == 300


def test_memory_is_what_the_library_says(tmp_path):
    (tmp_path / "train.toml").write_text(CONFIG)
    result = runner.invoke(app, ["memory", "--config", str(tmp_path / "train.toml"), "--json"])
    assert result.exit_code == 0, result.output
    config = TrainConfig.from_file(tmp_path / "train.toml")
    want = training_memory(config.model.build(), 8, 16)
    found = json.loads(result.stdout)
    assert (found["peak"], found["activations"]) == (want.peak, want.activations)
    assert found["measured"] is None


def test_memory_of_many_ranks_is_that_of_each(tmp_path):
    mesh = '\n[parallel]\npp = 2\nep = 2\nzero = 1\nschedule = "zb1p"\n'
    text = CONFIG.replace("[train]", "[train]\naccumulation = 4") + mesh
    (tmp_path / "train.toml").write_text(text)
    words = ["memory", "--config", str(tmp_path / "train.toml")]
    result = runner.invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.output
    first, last = json.loads(result.stdout)["ranks"]
    config = TrainConfig.from_file(tmp_path / "train.toml").model.build()
    whole = training_memory(config, 1, 16)
    experts = 4 * sum(part.experts for part in parameters_by_part(config).values())
    embedding = 4 * config.vocab_size * config.hidden_size  # both have it: the MTP module reads it
    both = first["parameters"] + last["parameters"]
    assert both == whole.parameters - experts / 2 + embedding
    assert first["moments"] < 2 * first["parameters"]  # of what both have, each has half
    assert last["logits"] == whole.logits
    shown = runner.invoke(app, words)
    assert "pipeline 1" in shown.output
    assert "gradients put off" in shown.output
    refused = runner.invoke(app, [*words, "--measure"])
    assert refused.exit_code == 2
    assert "--measure is for one process" in refused.output


def test_memory_of_fp8_is_measured_and_not_reckoned(tmp_path):
    config = CONFIG.replace("[train]", '[train]\ndtype_policy = "fp8"')
    (tmp_path / "train.toml").write_text(config)
    result = runner.invoke(app, ["memory", "--config", str(tmp_path / "train.toml")])
    assert result.exit_code == 2
    assert "no closed form for this: dtype_policy is 'fp8'" in result.output
