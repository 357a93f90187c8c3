"""Turn a Hugging Face directory into a GGUF file with llama.cpp's own converter.

`python -m bench.workers.convert_gguf LLAMA_CPP_SOURCE MODEL OUT TYPE`, run where torch and
transformers are. The file has no tokenizer: the benchmark feeds token numbers, and the converter
knows only tokenizers that were published.
"""

from __future__ import annotations

import sys


def main(source: str, model: str, out: str, kind: str) -> None:
    """Convert to `kind`: f32, bf16 or q8_0."""
    sys.path.insert(0, source)
    import convert_hf_to_gguf  # noqa: PLC0415 - found through the path set above
    from conversion.deepseek import DeepseekV2Model  # noqa: PLC0415 - the same

    DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_none  # noqa: SLF001 - no public switch
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
