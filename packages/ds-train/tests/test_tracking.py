"""What trackers were told is in the files that their own services read."""

import json
import struct

import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure
from tensorflow.core.util import event_pb2

from ds_train import StepMetrics, TrackerCallback, open_tracker
from ds_train.stability import OperandStats, StabilityMetrics
from ds_train.tracking import Tracker, flat


def tell(tracker, folder):
    """Tell a tracker one of each."""
    tracker.params({"seed": 1, "model": {"width": 8}})
    tracker.metrics(3, {"loss": 0.5})
    tracker.metrics(4, {"loss": 0.25})
    tracker.figure("curve", Figure(figsize=(1, 1)))
    path = folder / "notes.txt"
    path.write_text("kept")
    tracker.artifact(path)
    tracker.close()


def metrics(step):
    return StepMetrics(step, 2.0, 1.5, 1.0, 0.1, 3.0, 1e-3, 99.0, (0.5, 0.25), np.ones([2, 4]))


def test_tensorboard_reads_the_events(tmp_path):
    tell(open_tracker("tensorboard", tmp_path, "run"), tmp_path)
    scalars, tags = {}, set()
    for file in (tmp_path / "tensorboard").iterdir():
        for record in tf.data.TFRecordDataset(str(file)):
            event = event_pb2.Event.FromString(record.numpy())
            for value in event.summary.value:
                tags.add(value.tag)
                if value.tag == "loss":
                    scalars[event.step] = float(tf.make_ndarray(value.tensor))
    assert scalars == {3: 0.5, 4: 0.25}
    assert tags == {"params", "loss", "curve"}


def test_mlflow_reads_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip(
        "mlflow", reason="mlflow is an extra: pip install 'ds-train[mlflow]'"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tell(open_tracker("mlflow", tmp_path, "run"), tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "deepseek-v3"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "run"
    assert found.data.params == {"seed": "1", "model.width": "8"}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(3, 0.5), (4, 0.25)]
    assert {each.path for each in client.list_artifacts(found.info.run_id)} == {
        "figures",
        "notes.txt",
    }


def test_wandb_keeps_its_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="not here: pip install 'ds-train[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(open_tracker("wandb", tmp_path, "run"), tmp_path)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    records = wandb_records(next(folder.glob("*.wandb")))
    history = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in row.history.item}
        for row in records
        if row.HasField("history")
    ]
    assert [(row["_step"], row["loss"]) for row in history if "loss" in row] == [
        (3, 0.5),
        (4, 0.25),
    ]


def wandb_records(path):
    """Read a .wandb file: a LevelDB log (32 KiB blocks of fragments) of protocol buffers."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - an extra

    raw, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:  # no room for a fragment's head: the block ends in zeros
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole in one fragment, or the last of several
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def test_none_writes_nothing(tmp_path):
    tracker = open_tracker("none", tmp_path / "run", "run")
    tracker.params({})
    tracker.metrics(1, {"loss": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_auto_is_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    assert type(open_tracker("auto", tmp_path, "run")).__name__ == "_TensorBoard"
    monkeypatch.setattr("ds_train.tracking.find_spec", lambda _: None)
    assert type(open_tracker("auto", tmp_path, "run")) is Tracker


def test_what_is_not_there_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_train.tracking.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'ds-train\[mlflow\]'"):
        open_tracker("mlflow", tmp_path, "run")
    with pytest.raises(ValueError, match="tracker is 'paper'; it must be one of none, auto"):
        open_tracker("paper", tmp_path, "run")


class Heard(Tracker):
    def __init__(self):
        self.rows = []

    def metrics(self, step, values):
        self.rows.append((step, dict(values)))


def test_a_run_tells_every_few_steps_and_at_the_first():
    heard = Heard()
    callback = TrackerCallback(heard, every=2)
    for step in (1, 2, 3, 4):
        callback.on_step(metrics(step))
    assert [step for step, _ in heard.rows] == [1, 2, 4]
    values = heard.rows[0][1]
    assert values["train/cross_entropy"] == 1.5
    assert values["balance/max_violation_1"] == 0.25


def test_what_rounding_does_is_told():
    heard = Heard()
    stats = OperandStats(4.0, 0.1, 0.0, 0.0, 1.0, 2.0, -1.0)
    TrackerCallback(heard).on_stability(StabilityMetrics(5, {"block_0/x": stats}, {"w": 2.0}))
    step, values = heard.rows[0]
    assert step == 5
    assert values["fp8_amax/block_0/x"] == 4.0
    assert values["fp8_drift/block_0/x"] == -1.0
    assert values["gradient_norm/w"] == 2.0


def test_nested_names_are_joined():
    assert flat({"a": 1, "b": {"c": {"d": 2}}}) == {"a": 1, "b.c.d": 2}
