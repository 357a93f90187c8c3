"""The training run: it learns, and an interrupted one ends in the same bits."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from conftest import tables, tokens
from ds_train import Callback, CheckpointError, DataError, TrainConfig, Trainer, TrainError
from ds_train.metrics_log import read_metrics

TIMED = "tokens_per_second"  # all else in the log must repeat


class StopAfter(Callback):
    """Ends a run as a kill would: between a step and whatever follows it."""

    def __init__(self, step):
        self.step = step

    def on_step(self, metrics):
        if metrics.step == self.step:
            raise KeyboardInterrupt


def state(trainer):
    optimizer = trainer.optimizer
    variables = [*trainer.model.variables, *optimizer.momentums, *optimizer.velocities]
    return [v.numpy() for v in variables]


def log(out):
    return [
        {k: v for k, v in row.items() if k != TIMED} for row in read_metrics(out / "metrics.jsonl")
    ]


def test_it_learns(finished):
    rows = log(finished.out)
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    assert rows[-1]["cross_entropy"] < rows[0]["cross_entropy"] - 0.3
    assert rows[0]["cross_entropy"] == pytest.approx(np.log(300), rel=0.01)  # knows nothing yet
    assert [row["learning_rate"] for row in rows][:2] == pytest.approx([5e-3, 1e-2])
    assert sum(rows[-1]["loads"][0]) == 4 * 16 * 2  # every token reaches both its experts


def test_a_resumed_run_ends_in_the_same_bits(finished, tmp_path):
    config = TrainConfig.from_dict(tables())
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, tokens(), tmp_path, callbacks=[StopAfter(3)]).train()
    resumed = Trainer(config, tokens(), tmp_path)
    assert resumed.checkpoints.steps() == [2]
    resumed.train()
    for ours, theirs in zip(state(resumed), state(finished.trainer), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert log(tmp_path) == log(finished.out)


def test_a_finished_run_has_nothing_left_to_do(finished):
    again = Trainer(TrainConfig.from_dict(tables()), tokens(), finished.out)
    again.train()
    for ours, theirs in zip(state(again), state(finished.trainer), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": {"beta_2": 0.9}}, r"\[optimizer\] beta_2 was 0.95 and is now 0.9"),
        ({"train": {"steps": 7}}, r"\[train\] steps was 6 and is now 7"),
        ({"model": {"rms_norm_eps": 1e-5}}, r"\[model\] rms_norm_eps was None and is now 1e-05"),
    ],
)
def test_another_configuration_is_refused(finished, change, said):
    config = TrainConfig.from_dict(tables(**change))
    with pytest.raises(CheckpointError, match=said) as caught:
        Trainer(config, tokens(), finished.out).train()
    assert "\n" not in str(caught.value)


def test_a_run_from_before_a_key_existed_goes_on(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "old")
    for folder in (tmp_path / "old" / "checkpoints").iterdir():
        known = json.loads((folder / "state.json").read_text())
        del known["config"]["fp8"], known["config"]["optimizer"]["moments"], known["loss_scaling"]
        content = json.dumps(known).encode()
        (folder / "state.json").write_bytes(content)
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        manifest["state.json"] = {"bytes": len(content), "sha256": digest}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    again = Trainer(TrainConfig.from_dict(tables()), tokens(), tmp_path / "old")
    again.train()  # nothing is left to do
    for ours, theirs in zip(state(again), state(finished.trainer), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = TrainConfig.from_dict(tables(optimizer={"moments": "bfloat16"}))
    with pytest.raises(CheckpointError, match="moments was 'float32' and is now 'bfloat16'"):
        Trainer(other, tokens(), tmp_path / "old").train()


def test_what_does_not_change_the_numbers_may_change(finished):
    config = TrainConfig.from_dict(
        tables(checkpoint={"every": 5}, train={"log_every": 3, "recompute": "block"})
    )
    Trainer(config, tokens(), finished.out).train()


def test_other_text_is_refused(finished):
    with pytest.raises(CheckpointError, match="the text has changed"):
        Trainer(TrainConfig.from_dict(tables()), tokens(599), finished.out).train()


def test_no_resume_loses_nothing(finished):
    trainer = Trainer(TrainConfig.from_dict(tables()), tokens(), finished.out)
    with pytest.raises(CheckpointError, match="has checkpoints up to step 6"):
        trainer.train(resume=False)
    assert trainer.checkpoints.steps() == [4, 6]


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    config = TrainConfig.from_dict(tables(model={"vocab_size": 290}))
    with pytest.raises(TrainError, match=r"token id 296 .* vocab_size is 290"):
        Trainer(config, tokens(), tmp_path)


def test_the_latest_part_alone_is_trained_on(tmp_path):
    ids = np.r_[np.full(300, 299), np.arange(40) % 20].astype(np.uint16)
    config = TrainConfig.from_dict(tables(data={"latest": 0.1}, model={"vocab_size": 264}))
    # Ids before the last tenth would be outside the vocabulary.
    assert Trainer(config, ids, tmp_path).checkpoints.steps() == []


def test_too_little_text_is_one_line(tmp_path):
    with pytest.raises(DataError, match="too few for one sequence of 16"):
        Trainer(TrainConfig.from_dict(tables()), tokens(12), tmp_path)


def test_a_loss_that_explodes_stops_the_run_before_it_is_saved(tmp_path):
    trainer = Trainer(TrainConfig.from_dict(tables()), tokens(), tmp_path)
    trainer.model.embed_tokens.embeddings.assign(np.full((300, 32), np.nan))
    with pytest.raises(TrainError, match=r"step 1: loss nan .* peak"):
        trainer.train()
    assert trainer.checkpoints.steps() == []


def test_a_log_cut_short_by_a_kill_is_mended(finished, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = (finished.out / "metrics.jsonl").read_text()
    path.write_text(whole[:-20])
    assert read_metrics(path) == [json.loads(line) for line in whole.splitlines()[:-1]]
