"""Turn a Hugging Face directory into a GGUF file with llama.cpp's own converter.

`python -m bench.workers.convert_gguf LLAMA_CPP_SOURCE MODEL OUT TYPE [tokenizer]`, run where torch
and transformers are. Without the last word the file has no tokenizer: most benchmarks feed token
numbers. The converter knows only tokenizers that were published, so ours passes for one of them;
how text is cut into words differs then, which nothing here depends on.
"""

from __future__ import annotations

import sys


def main(source: str, model: str, out: str, kind: str, vocabulary: str = "none") -> None:
    """Convert to `kind`: f32, bf16 or q8_0; `vocabulary` is "none" or "tokenizer"."""
    sys.path.insert(0, source)
    import convert_hf_to_gguf  # noqa: PLC0415 - found through the path set above
    from conversion.deepseek import DeepseekV2Model  # noqa: PLC0415 - the same

    if vocabulary == "none":  # no public switch
        DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_none  # noqa: SLF001
    else:
        DeepseekV2Model.get_vocab_base_pre = lambda *_: "deepseek-llm"
        DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_gpt2  # noqa: SLF001
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
