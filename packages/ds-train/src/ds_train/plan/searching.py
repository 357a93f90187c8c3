"""The best of many recipes; what is shared out in which way is that of arXiv 2412.19437, 3.2."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

from ds_model import ModelConfig
from ds_train.parallel.schedules import Name
from ds_train.plan.cluster import Cluster, Precision
from ds_train.plan.planner import Plan, make_plan
from ds_train.plan.recipe import PlanError, Recipe, Recomputed


def search(
    config: ModelConfig,
    cluster: Cluster,
    devices: int,
    batch: int,
    sequence: int,
    precision: Precision = "bfloat16",
) -> list[Plan]:
    """Try meshes, schedules, micro-batches and what is made again; the fastest that fit come first.

    Args:
        config: the model.
        cluster: where.
        devices: how many.
        batch: sequences of a step.
        sequence: tokens of one.
        precision: of the products.

    Returns:
        Plans that fit, by their speed, of each mesh the best alone; if none fits, the one that
        lacks least.

    Raises:
        PlanError: nothing can be tried: says what of it is wrong.
    """
    basis: dict[str, Any] = {
        "devices": devices,
        "batch": batch,
        "sequence": sequence,
        "precision": precision,
    }
    best: dict[tuple[int, int], Plan] = {}
    least: Plan | None = None
    error: PlanError | None = None
    for changes in _recipes(devices, batch, config):
        try:
            recipe = Recipe(**basis, **changes)
            found = make_plan(config, cluster, recipe)
        except PlanError as said:
            error = said
            continue
        if not found.fits:
            least = found if least is None or found.peak < least.peak else least
            continue
        key = (recipe.pp, recipe.ep)
        if key not in best or found.step_seconds < best[key].step_seconds:
            best[key] = found
    if best:
        return sorted(best.values(), key=lambda plan: plan.step_seconds)
    if least is not None:
        return [least]
    raise error or PlanError(f"no mesh of {devices} devices divides a batch of {batch}")


def _recipes(devices: int, batch: int, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield what is worth trying."""
    experts = config.n_routed_experts or 1
    for pp in (n for n in range(1, config.num_hidden_layers + 1) if devices % n == 0):
        for ep in (n for n in range(1, experts + 1) if experts % n == 0):
            if devices // pp % ep:
                continue
            for micro_batch in (1, 2, 4, 8):
                if batch % (micro_batch * devices // pp):
                    continue
                mesh = {"pp": pp, "ep": ep, "micro_batch": micro_batch}
                for schedule, recompute in product(get_args(Name), get_args(Recomputed)):
                    if pp > 1 or schedule == "1f1b":
                        yield {**mesh, "schedule": schedule, "recompute": recompute}
