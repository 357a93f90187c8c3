"""Turn a GGUF file into one of fewer bits with llama.cpp's own quantizer, as its tool does.

`python -m bench.workers.quantize_gguf SOURCE OUT TYPE`, run where llama-cpp-python is. What it
chooses for embedding and head is kept: more bits than for the rest.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as cpp

TYPES = {"q4_0": cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def main(source: str, out: str, kind: str) -> None:
    """Quantize to `kind`.

    Raises:
        RuntimeError: llama.cpp refuses.
    """
    wanted = cpp.llama_model_quantize_default_params()
    wanted.ftype = TYPES[kind]
    if code := cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(wanted)):
        raise RuntimeError(f"llama_model_quantize gives {code} for {source}")


if __name__ == "__main__":
    main(*sys.argv[1:])
