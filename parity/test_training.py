"""Fifty steps of training, here and in torch, from the same weights on the same batches.

Same in both: AdamW with torch's place of epsilon, decay on matrices only, clipping, warm-up
and cosine, float32. The bias update is off, for transformers has none.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch
from reference_cases import BY_NAME, Case
from torch.nn import functional

from ds_model import CausalLM
from ds_train import AdamW, TrainConfig
from ds_train.step import TrainStep
from parity import pairs, peer

STEPS = 50
CONFIG = TrainConfig.from_dict(
    {
        "schedule": {"peak": 2e-3, "floor": 2e-4, "warmup_steps": 10, "constant_until": 0.4},
        "loss": {"mtp_weight": 0.0, "mtp_weight_late": 0.0, "balance_alpha": 0.0}
        | {"bias_update_speed": 0.0},
        "train": {"steps": STEPS, "batch_size": 4},
    }
)


def batches(case: Case) -> np.ndarray:
    """Return `[steps, batch, sequence + 1]` ids that can be learnt: rows count in strides."""
    rng = np.random.default_rng(case.seed)
    start, stride = rng.integers(0, 90, (2, STEPS, 4, 1))
    return (3 + (start + (1 + stride % 4) * np.arange(25)) % 90).astype(np.int32)


def our_curve(case: Case, tokens: np.ndarray) -> list[float]:
    model = CausalLM.from_pretrained(pairs.folder_of(case))
    table = CONFIG.optimizer
    optimizer = AdamW(
        CONFIG.learning_rate(),
        beta_1=table.beta_1,
        beta_2=table.beta_2,
        epsilon=table.epsilon,
        weight_decay=table.weight_decay,
    )
    step = TrainStep(model, optimizer, CONFIG)
    losses = [step.compiled(tf.constant(batch[None])).scalars["cross_entropy"] for batch in tokens]
    return [float(loss) for loss in losses]


def torch_curve(case: Case, tokens: np.ndarray) -> list[float]:
    model = peer.load(pairs.folder_of(case)).train()
    table, schedule = CONFIG.optimizer, CONFIG.learning_rate()
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
    losses = []
    for index, batch in enumerate(tokens):
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(index))
        ids = torch.tensor(batch).long()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), table.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["plain", "tied-head-mtp", "v2-group-limited"])
def test_loss_curve(name: str) -> None:
    case = BY_NAME[name]
    tokens = batches(case)
    ours, theirs = our_curve(case, tokens), torch_curve(case, tokens)
    assert theirs[-1] < 0.8 * theirs[0]
    apart = np.abs(np.array(ours) - theirs) / np.abs(theirs).max()
    assert apart.max() < 1e-3, f"{apart.max():.1e} at step {apart.argmax()}"
