"""Write the reference files that the packages' own tests read without torch.

    nox -s parity -- --write-references      (or: python -m parity.write_references)

Run it when a case is added or changed. The suite runs it too, and compares: the committed
files must be what transformers says today.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import reference_file
from reference_cases import COMMITTED, NEW_TOKENS, Case
from reference_weights import trained_names, weights, write_checkpoint
from safetensors.numpy import save_file

from parity import layers, peer


def numbers(case: Case) -> dict[str, np.ndarray]:
    """Return the content of the case's reference file."""
    with tempfile.TemporaryDirectory() as folder:
        model = peer.load(write_checkpoint(case, Path(folder)))
    ids, mask = case.batch()
    run = peer.forward(model, ids, mask)
    content = {"logits": run.logits, "greedy": peer.greedy(model, ids, mask, NEW_TOKENS)}
    content |= {f"experts.{i}": x.astype(np.int32) for i, x in enumerate(run.experts)}
    if case.depth:
        depths, _ = peer.mtp_logits(model, weights(case), ids)
        content |= {f"mtp.{i}": x for i, x in enumerate(depths)}
    slopes = peer.gradients(model, ids, mask)
    content |= reference_file.digest(slopes, trained_names(case.config))
    return {name: np.ascontiguousarray(array) for name, array in content.items()}


def main() -> None:
    """Write every committed case and layer."""
    reference_file.FOLDER.mkdir(exist_ok=True)
    for case in COMMITTED:
        path = reference_file.path_of(case)
        save_file(numbers(case), path)
        _report(path)
    for layer in layers.LAYERS:
        layers.write(layer)
        _report(layer.path)


def _report(path: Path) -> None:
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")  # noqa: T201 - a command


if __name__ == "__main__":
    main()
