"""What `transformers` in torch says about a checkpoint: the reference of the suite.

Shapes: B batch, S sequence, V vocabulary, T = B*S tokens, K experts a token, E experts.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from torch.nn import functional
from transformers.modeling_layers import MtpModel

# Tiny tensors gain nothing from threads, and threads that wait get in TensorFlow's way.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass of the reference.

    Attributes:
        logits: `[B, S, V]` float32.
        experts: for each MoE layer, the chosen experts `[T, K]`.
        margin: least distance between a choice and its alternative at a real token.
    """

    logits: np.ndarray
    experts: tuple[np.ndarray, ...]
    margin: float


def load(directory: Path) -> torch.nn.Module:
    """Open a Hugging Face directory with the class that its `config.json` names."""
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    # The plain programs: the faster ones want widths that are multiples of 4.
    model = kind.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


def positions(mask: np.ndarray) -> torch.Tensor:
    """Return `[B, S]` positions that count real tokens only."""
    return torch.tensor(np.maximum(np.cumsum(mask, axis=-1) - 1, 0))


def _run(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    return model(
        input_ids=torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        position_ids=positions(mask),
        use_cache=False,
    ).logits


def _routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m).__name__.endswith("TopkRouter")]


def _gap(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return, per row, the distance between the last kept score and the first dropped."""
    if keep >= scores.shape[-1]:
        return torch.full(scores.shape[:-1], torch.inf)
    best = scores.topk(keep + 1, dim=-1).values
    return best[..., keep - 1] - best[..., keep]


def _margin(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Return `[T]`: how far each token is from choosing another group or expert."""
    if type(router).__name__.startswith("DeepseekV2"):
        scores, best = logits.softmax(-1), 1
        grouped = router.topk_method == "group_limited_greedy"
    else:
        scores, best, grouped = logits.sigmoid() + router.e_score_correction_bias, 2, True
    gap = torch.full(scores.shape[:1], torch.inf)
    if grouped:
        by_group = scores.unflatten(-1, (router.num_group, -1))
        group_scores = by_group.topk(best, dim=-1).values.sum(-1)
        gap = _gap(group_scores, router.topk_group)
        kept = torch.zeros_like(group_scores).scatter_(
            1, group_scores.topk(router.topk_group, dim=-1).indices, 1
        )
        scores = scores.masked_fill(
            kept[..., None].expand_as(by_group).flatten(1) == 0, float("-inf")
        )
    return torch.minimum(gap, _gap(scores, router.top_k))


@torch.no_grad()
def forward(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> Forward:
    """Run the model once and watch its routers."""
    real = torch.tensor(mask.reshape(-1) == 1)
    experts: list[np.ndarray] = []
    margins = [float("inf")]

    def watch(router: torch.nn.Module, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        experts.append(output[2].numpy().copy())
        margins.append(float(_margin(router, output[0])[real].min()))

    hooks = [router.register_forward_hook(watch) for router in _routers(model)]
    try:
        logits = _run(model, ids, mask).numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return Forward(logits, tuple(experts), min(margins))


def loss(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """Return the mean cross-entropy of each real token after a real token."""
    logits = _run(model, ids, mask)[:, :-1]
    targets = torch.tensor(ids).long()[:, 1:]
    counted = torch.tensor((mask[:, 1:] * mask[:, :-1]).astype(np.float32))
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (each * counted.flatten()).sum() / counted.sum()


def _released(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the model's tensors as its own `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def gradients(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Return the loss's gradient of every parameter under its released name.

    The gradients are put in the place of the weights and saved: whatever transformers
    does to turn its parameters into released tensors, it does to the gradients.
    """
    model = copy.deepcopy(model)
    loss(model, ids, mask).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    bias = "e_score_correction_bias"
    return {k: v for k, v in _released(model).items() if not k.endswith(bias)}


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray, new: int) -> np.ndarray:
    """Continue greedily by `new` tokens, never stopping early; `[B, S + new]` int32."""
    # The mask is passed: without it, generate takes prompt tokens equal to the padding
    # token for padding.
    out = model.generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=model.config.pad_token_id,
    )
    return out.numpy().astype(np.int32)


def _stacked(tensors: dict[str, np.ndarray], prefix: str, experts: int) -> dict[str, np.ndarray]:
    """Stack one block's experts as transformers keeps them in memory."""

    def each(name: str) -> np.ndarray:
        return np.stack([tensors[f"{prefix}mlp.experts.{e}.{name}.weight"] for e in range(experts)])

    return {
        "mlp.experts.gate_up_proj": np.concatenate([each("gate_proj"), each("up_proj")], axis=1),
        "mlp.experts.down_proj": each("down_proj"),
    }


def mtp_model(model: torch.nn.Module, tensors: dict[str, np.ndarray]) -> MtpModel:
    """Build the checkpoint's MTP modules by hand.

    `MtpModel.from_pretrained` finds only tensors of layer 61, where the released model has
    its module; a tiny model's stand elsewhere.
    """
    config = model.config
    depth = config.num_mtp_layers
    modules = MtpModel(model, depth).eval()
    for k in range(depth):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        state: dict[str, np.ndarray] = {
            f"mtp_block.{name}": array
            for name, array in _stacked(tensors, prefix, config.n_routed_experts).items()
        }
        for name, array in tensors.items():
            if not name.startswith(prefix) or ".experts." in name:
                continue
            rest = name.removeprefix(prefix)
            if rest.startswith(("enorm", "hnorm", "eh_proj")):
                state[rest] = array
            elif rest == "shared_head.norm.weight":
                state["post_norm.weight"] = array
            elif not rest.startswith(("embed_tokens", "shared_head.head")):
                state[f"mtp_block.{rest}"] = array
        modules.layers[k].load_state_dict({n: torch.tensor(a) for n, a in state.items()})
    modules.config._attn_implementation = "eager"
    return modules


@torch.no_grad()
def mtp_logits(
    model: torch.nn.Module, tensors: dict[str, np.ndarray], ids: np.ndarray
) -> tuple[tuple[np.ndarray, ...], float]:
    """Return the logits of each depth k from 1, `[B, S - k, V]`, and the routing margin.

    Depth k sees, at position i, the hidden state of depth k - 1 at i (depth 0: the main
    model's after its final norm) and the embedding of token i + k.
    """
    modules = mtp_model(model, tensors)
    tokens = torch.tensor(ids).long()
    hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    margins = [float("inf")]
    for router in _routers(modules.layers):
        router.register_forward_hook(
            lambda r, _, out: margins.append(float(_margin(r, out[0]).min()))
        )
    logits = []
    for k in range(1, len(modules.layers) + 1):
        ahead = tokens[:, k:]
        where = torch.arange(k, tokens.shape[1])[None].expand(ahead.shape)
        hidden = modules.forward_layer(
            k - 1, hidden[:, : ahead.shape[1]], where, None, input_ids=ahead
        )
        logits.append(model.lm_head(hidden).numpy())
    return tuple(logits), min(margins)
