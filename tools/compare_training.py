"""Train here and with transformers in torch, side by side: the same loss curve.

Both start from the weights that transformers saved, see the same batches, and take the same
AdamW steps in float32: decay on matrices only, clipping, warm-up and cosine, torch's place of
epsilon. The bias update is off in both, and so is the balance loss: transformers has neither.

    python tools/compare_training.py --steps 50

needs ds-train, torch and transformers (`nox -s parity` has them). Exit code 1 if the curves
differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
import torch
import transformers
from torch.nn import functional

from ds_model import CausalLM
from ds_train import AdamW, TrainConfig
from ds_train.step import TrainStep

TOLERANCE = 1e-3
VOCABULARY = 128
TINY = transformers.DeepseekV3Config(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_shared_experts=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    max_position_embeddings=128,
)


@dataclass(frozen=True)
class Row:
    """One optimizer step on both sides.

    Attributes:
        step: From 1.
        rate: Learning rate.
        ours: Loss here, nats a token.
        theirs: Loss in torch.
        our_norm: Gradient norm here, before clipping.
        their_norm: The same in torch.
    """

    step: int
    rate: float
    ours: float
    theirs: float
    our_norm: float
    their_norm: float

    @property
    def difference(self) -> float:
        """Return `|ours - theirs| / |theirs|`."""
        return abs(self.ours - self.theirs) / abs(self.theirs)


def compare(
    checkpoint: Path | None = None, tokens: np.ndarray | None = None, steps: int = 50
) -> list[Row]:
    """Train both sides.

    Args:
        checkpoint: A Hugging Face directory to start from; random weights that transformers
            saved if None.
        tokens: Batches `[steps, batch, sequence + 1]` int32; a task that can be learnt if None.
        steps: How many, where `tokens` does not say.
    """
    if tokens is None:
        tokens = counting(steps)
    config = settings(len(tokens))
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint or random_weights(Path(scratch))
        ours = train_here(folder, tokens, config)
        theirs = train_in_torch(folder, tokens, config)
    schedule = config.learning_rate()
    return [
        Row(index + 1, float(schedule(index)), here[0], there[0], here[1], there[1])
        for index, (here, there) in enumerate(zip(ours, theirs, strict=True))
    ]


def settings(steps: int) -> TrainConfig:
    """Return the paper's optimizer, a schedule that has all its phases, no balancing."""
    return TrainConfig.from_dict(
        {
            "schedule": {"peak": 2e-3, "floor": 2e-4, "final": 7e-5, "warmup_steps": steps // 5}
            | {"constant_until": 0.4},
            "loss": {"mtp_weight": 0.0, "mtp_weight_late": 0.0, "balance_alpha": 0.0}
            | {"bias_update_speed": 0.0},
            "train": {"steps": steps},
        }
    )


def counting(steps: int, batch: int = 8, length: int = 32, seed: int = 0) -> np.ndarray:
    """Return `[steps, batch, length + 1]` ids: each row counts in a stride of its own."""
    rng = np.random.default_rng(seed)
    start, stride = rng.integers(0, VOCABULARY, (2, steps, batch, 1))
    return ((start + (1 + stride % 4) * np.arange(length + 1)) % VOCABULARY).astype(np.int32)


def random_weights(folder: Path) -> Path:
    """Let transformers draw and save random weights."""
    torch.manual_seed(0)
    transformers.DeepseekV3ForCausalLM(TINY).save_pretrained(folder)
    return folder


def train_here(folder: Path, tokens: np.ndarray, config: TrainConfig) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step in TensorFlow."""
    model = CausalLM.from_pretrained(folder)
    table = config.optimizer
    optimizer = AdamW(
        config.learning_rate(),
        table.beta_1,
        table.beta_2,
        epsilon=table.epsilon,
        weight_decay=table.weight_decay,
    )
    step = TrainStep(model, optimizer, config)
    outputs = (step.compiled(tf.constant(batch[None])).scalars for batch in tokens)
    return [(float(out["cross_entropy"]), float(out["gradient_norm"])) for out in outputs]


def train_in_torch(
    folder: Path, tokens: np.ndarray, config: TrainConfig
) -> list[tuple[float, float]]:
    """Return loss and gradient norm of each step in torch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).train()
    table, schedule = config.optimizer, config.learning_rate()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        betas=(table.beta_1, table.beta_2),
        eps=table.epsilon,
        weight_decay=table.weight_decay,
    )
    curve = []
    for index, batch in enumerate(tokens):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(index))
        ids = torch.tensor(batch).long()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), table.clip_norm)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory to start from")
    options = parser.parse_args()
    rows = compare(options.checkpoint, steps=options.steps)
    print(f"{'step':>4}  {'rate':>8}  {'loss here':>10}  {'in torch':>10}  {'apart':>8}  norms")
    for row in rows:
        print(
            f"{row.step:4}  {row.rate:8.1e}  {row.ours:10.6f}  {row.theirs:10.6f}  "
            f"{row.difference:8.1e}  {row.our_norm:.4f} {row.their_norm:.4f}"
        )
    worst = max(rows, key=lambda row: row.difference)
    verdict = "within" if worst.difference < TOLERANCE else "NOT within"
    print(f"farthest apart: {worst.difference:.1e} at step {worst.step}, {verdict} {TOLERANCE:g}")
    return 0 if worst.difference < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
