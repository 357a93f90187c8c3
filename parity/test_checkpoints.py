"""What one side saved, the other opens: same tensors, same configuration, same logits."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import numpy as np
import pytest
import reference_ours as ours
import torch
import transformers
from reference_cases import BY_NAME, CASES, Case
from reference_weights import released_shapes, weights
from safetensors.numpy import load_file, save_file

from ds_model import CausalLM, CheckpointError, ModelConfig
from parity import pairs, peer
from parity.measure import LOGITS, relative, same_experts

if TYPE_CHECKING:
    from pathlib import Path

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_what_transformers_saved_loads_here(case: Case) -> None:
    ids, mask = case.batch()
    model = CausalLM.from_pretrained(pairs.saved_by_peer(case))
    mine, theirs = model(ids, mask).numpy(), pairs.peer_forward(case).logits
    assert relative(mine[mask == 1], theirs[mask == 1]) < LOGITS


@every_case
def test_what_we_saved_loads_there(case: Case, tmp_path: Path) -> None:
    pairs.ours_of(case).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kind = getattr(transformers, case.config["architectures"][0])
    _, loading = kind.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    blocks = config.num_hidden_layers
    modules = tuple(f"model.layers.{blocks + k}." for k in range(case.depth))
    assert all(name.startswith(modules) for name in loading["unexpected_keys"])
    # The weights are the same bits, so torch computes the same bits.
    again = peer.forward(peer.load(tmp_path), *case.batch()).logits
    np.testing.assert_array_equal(again, pairs.peer_forward(case).logits)


@every_case
def test_round_trip_keeps_every_tensor(case: Case) -> None:
    before, after = weights(case), ours.released(pairs.ours_of(case))
    assert before.keys() == after.keys() == {name for name, _ in released_shapes(case.config)}
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@every_case
def test_both_forms_of_rope_in_config(case: Case) -> None:
    newer = json.loads((pairs.saved_by_peer(case) / "config.json").read_text())
    assert "rope_parameters" in newer
    assert "rope_scaling" not in newer
    assert ModelConfig.from_dict(newer) == ModelConfig.from_dict(case.config)


@every_case
def test_our_config_means_the_same_there(case: Case, tmp_path: Path) -> None:
    config = ModelConfig.from_dict(case.config).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    mine = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs = pairs.peer_of(case).config.to_dict()
    passing = {"_name_or_path", "dtype", "transformers_version", "rope_parameters"}
    assert {k: mine.get(k) for k in theirs.keys() - passing} == {
        k: v for k, v in theirs.items() if k not in passing
    }
    # Ours spells out the defaults beside what the original file said.
    rope = theirs["rope_parameters"]
    assert {k: mine["rope_parameters"].get(k) for k in rope} == rope


def test_absent_mtp_module_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    case = BY_NAME["released"]
    with caplog.at_level(logging.WARNING):
        model = CausalLM.from_pretrained(pairs.saved_by_peer(case))
    assert model.config.num_nextn_predict_layers == 0
    assert "MTP" in caplog.text


def test_partial_mtp_module_is_an_error(tmp_path: Path) -> None:
    case = BY_NAME["two-mtp-modules"]
    tensors = load_file(pairs.folder_of(case) / "model.safetensors")
    second = f"model.layers.{case.config['num_hidden_layers'] + 1}."
    kept = {name: array for name, array in tensors.items() if not name.startswith(second)}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    with pytest.raises(CheckpointError, match=second.replace(".", r"\.")):
        CausalLM.from_pretrained(tmp_path)


def test_shards_of_transformers_load(tmp_path: Path) -> None:
    case = BY_NAME["v2-group-limited"]
    pairs.peer_of(case).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids, mask = case.batch()
    mine = CausalLM.from_pretrained(tmp_path)(ids, mask).numpy()
    assert relative(mine, pairs.peer_forward(case).logits) < LOGITS


@pytest.mark.parametrize("name", ["left-padded", "v2-lite"])
def test_bfloat16_files(name: str, tmp_path: Path) -> None:
    """Weights stored in bfloat16, as most people have them, opened in float32 by both."""
    case = BY_NAME[name]
    peer.load(pairs.folder_of(case)).bfloat16().save_pretrained(tmp_path)
    ids, mask = case.batch()
    theirs = peer.forward(peer.load(tmp_path), ids, mask)
    model = CausalLM.from_pretrained(tmp_path)
    real = mask == 1
    assert relative(model(ids, mask).numpy()[real], theirs.logits[real]) < LOGITS
    for mine, chosen in zip(ours.experts(model, ids, mask), theirs.experts, strict=True):
        assert same_experts(mine[real.ravel()], chosen[real.ravel()])
