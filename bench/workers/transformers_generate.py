"""Plain `generate` of transformers: `MODEL PRECISION ROWS PROMPT NEW`; prints seconds as JSON."""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM

RUNS = 2


def main(model: str, precision: str, rows: str, prompt: str, new: str) -> None:
    """Generate twice and print the second and third time's seconds."""
    transformers.logging.disable_progress_bar()
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    torch.manual_seed(0)
    ids = torch.randint(300, 8000, (int(rows), int(prompt)))
    seconds = []
    for run in range(RUNS + 1 if int(rows) < 128 else 1):
        begun = time.perf_counter()
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=int(new),
                min_new_tokens=int(new),
                do_sample=False,
                pad_token_id=0,
            )
        if run or int(rows) >= 128:
            seconds.append(time.perf_counter() - begun)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
