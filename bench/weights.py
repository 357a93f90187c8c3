"""The model that all systems are given: random weights, written once as our export writes them.

`python -m bench.weights DIRECTORY [field=value ...]`, in a process of its own, so that the driver
holds no model. Norm weights and router biases are random too: a system that passes over them
disagrees.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from bench.tasks import PRESET
from ds_model import CausalLM, ModelConfig

SEED = 20260
BIAS_SPREAD = 0.05  # of the router's biases: some choices change, none is forced
NORM_SPREAD = 0.2


def write(directory: Path, **changes: Any) -> None:
    """Write preset `bench`, with some fields changed, as a Hugging Face directory."""
    keras.utils.set_random_seed(SEED)
    model = CausalLM(ModelConfig.preset(PRESET).replace(**changes))
    random = np.random.default_rng(SEED)
    for variable in model.weights:
        if variable.path.endswith("e_score_correction_bias"):
            variable.assign(random.normal(0, BIAS_SPREAD, variable.shape))
        elif len(variable.shape) == 1:  # the norms' weights; no layer here has another bias
            variable.assign(1 + random.normal(0, NORM_SPREAD, variable.shape))
    model.save_pretrained(directory)
    # What is compiled on first use is compiled here, once, and no part of any figure.
    model.generate(np.full((1, 8), 2), max_new_tokens=2, eos_token_id=[])


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[2:])
    write(Path(sys.argv[1]), **{name: ast.literal_eval(value) for name, value in given.items()})
