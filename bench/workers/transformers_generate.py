"""Plain `generate` of transformers: `MODEL PRECISION ROWS PROMPT NEW`; prints seconds as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

RUNS, LONG = 2, 32  # times; with so many rows once, which takes minutes


def main(model: str, precision: str, rows: str, prompt: str, new: str) -> None:
    """Generate, a few tokens first, and print the seconds of each time but that."""
    transformers.logging.disable_progress_bar()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    torch.manual_seed(0)
    ids = torch.randint(300, 8000, (int(rows), int(prompt)))
    seconds = []
    for tokens in (2, *[int(new)] * (RUNS if int(rows) < LONG else 1)):
        begun = time.perf_counter()
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - begun)
    del seconds[0]
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
