"""The configuration file: what it refuses, and that it says what would be right."""

import pytest

from ds_train import TrainConfig, TrainConfigError


def read(tmp_path, text):
    path = tmp_path / "train.toml"
    path.write_text(text)
    return TrainConfig.from_file(path)


def test_reads_tables_and_keeps_the_papers_defaults(tmp_path):
    config = read(tmp_path, '[model]\npreset = "tiny"\n[schedule]\npeak = 1e-3\n')
    assert config.schedule.peak == 1e-3
    assert (config.optimizer.beta_1, config.optimizer.beta_2) == (0.9, 0.95)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.1, 1.0)
    assert (config.loss.mtp_weight, config.loss.mtp_weight_late) == (0.3, 0.1)


def test_model_fields_override_the_preset(tmp_path):
    config = read(tmp_path, '[model]\npreset = "tiny"\nvocab_size = 777\n')
    assert config.model.build().vocab_size == 777


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optimiser]\n", ["[optimiser]", "unknown key", "optimizer"]),
        ("[optimizer]\nbeta1 = 0.9\n", ["[optimizer] beta1", "unknown key", "beta_1"]),
        ("[optimizer]\nbeta_2 = 1.5\n", ["[optimizer] beta_2", "1.5", "less than 1"]),
        ("[train]\nsteps = 'many'\n", ["[train] steps", "'many'", "integer"]),
        ("[train]\ndtype_policy = 'int3'\n", ["dtype_policy", "int3", "mixed_bfloat16"]),
        ("[fp8]\nscaling = 'row'\n", ["[fp8]", "'row'", "'block' or 'tensor'"]),
        ("[fp8]\npromote_every = 100\n", ["[fp8]", "100", "multiple of 32"]),
        ("[fp8]\ntiles = 64\n", ["[fp8] tiles", "unknown key", "tile"]),
        ("[train]\nrecompute = true\n", ["[train] recompute", "'none', 'parts' or 'block'"]),
        ("[train]\nbatch_size = 6\naccumulation = 4\n", ["accumulation = 4", "batch_size = 6"]),
        ("[schedule]\nconstant_until = 0.9\ncosine_until = 0.5\n", ["[schedule]", "in order"]),
        ("[model]\npreset = 'huge'\n", ["[model]", "huge", "mini"]),
        ("[model]\nhidden_sise = 3\n", ["[model]", "hidden_sise"]),
        ("[model]\nhidden_size = -3\n", ["[model]", "hidden_size", "-3"]),
        ("steps = = 3\n", ["not a TOML file", "line 1"]),
    ],
)
def test_bad_files_get_one_line_that_helps(tmp_path, text, parts):
    with pytest.raises(TrainConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(tmp_path / "train.toml"))
    for part in parts:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TrainConfigError, match=r"none\.toml: cannot be read"):
        TrainConfig.from_file(tmp_path / "none.toml")


def test_a_short_run_keeps_its_phases_in_order():
    config = TrainConfig.from_dict({"train": {"steps": 5}})
    schedule = config.learning_rate()
    assert (schedule.warmup_steps, schedule.tail_until) == (5, 5)
