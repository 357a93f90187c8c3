"""A SavedModel that writes what the model writes, in a process that has TensorFlow alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from ds_serve.export import export_saved_model

ALONE = """
import json, sys
import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
prompts, new = json.loads(sys.argv[2]), int(sys.argv[3])
lengths = np.array([len(prompt) for prompt in prompts], np.int32)
ids = np.zeros([len(prompts), lengths.max()], np.int32)
for row, prompt in enumerate(prompts):
    ids[row, : len(prompt)] = prompt
prefill, decode = (loaded.signatures[name] for name in ("prefill", "decode"))
slots = tf.constant(int(lengths.max()) + new)
found = loaded.prefill(tf.constant(ids), tf.constant(lengths), slots)
written = []
for _ in range(new):
    token = tf.argmax(found["logits"], axis=-1, output_type=tf.int32)
    written.append(token.numpy().tolist())
    found = loaded.decode(token, tf.constant(lengths), found["cache"])
    lengths += 1
assert not [name for name in sys.modules if name.split(".")[0].startswith("ds_")]
outputs, inputs = prefill.structured_outputs, decode.structured_input_signature[1]
ids = np.array(written).T.tolist()
print(json.dumps({"ids": ids, "outputs": sorted(outputs), "inputs": sorted(inputs)}))
"""


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exports") / "saved"
    export_saved_model(model, directory)
    return directory


def test_it_writes_the_same_without_these_packages(saved, greedy):
    prompts = [[5, 6, 7, 8, 9], [30, 31], [100, 7, 44, 2]]
    command = [sys.executable, "-I", "-c", ALONE, str(saved), json.dumps(prompts), "9"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["ids"] == [greedy(prompt, 9).tolist() for prompt in prompts]
    assert found["outputs"] == ["cache", "logits"]
    assert found["inputs"] == ["cache", "lengths", "token"]


def test_it_holds_stock_operations_alone(saved):
    loaded = tf.saved_model.load(saved)
    for name in ("prefill", "decode"):
        graph = loaded.signatures[name].graph
        kinds = {node.op for node in graph.as_graph_def().node}
        kinds |= {
            node.op
            for function in graph.as_graph_def().library.function
            for node in function.node_def
        }
        assert not [kind for kind in kinds if kind.startswith("Ds")]


def test_its_logits_are_the_models(saved, model):
    ids = np.array([[3, 1, 4, 1, 5]], np.int32)
    loaded = tf.saved_model.load(saved)
    found = loaded.prefill(tf.constant(ids), tf.constant([5]), tf.constant(6))
    np.testing.assert_allclose(found["logits"], model(ids)[:, -1], atol=2e-5)
    facts = json.loads((saved / "ds.json").read_text("utf-8"))
    assert found["cache"].shape == (2, 1, 6, facts["cache_width"])


def test_a_directory_with_files_is_left_alone(model, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="has files in it; name a new directory"):
        export_saved_model(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
