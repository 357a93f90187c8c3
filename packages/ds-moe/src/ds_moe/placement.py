"""Which experts get a copy, and where each copy lies, so that machines are evenly loaded.

DeepSeek-V3 serves its busiest experts in several copies (arXiv 2412.19437, section 3.4); how they
are chosen and placed is published as EPLB, whose names and results these are. Nothing here runs an
expert: loads go in, a plan comes out.

Letters: L layers, E experts of the model, P copies that exist ("physical experts").
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Placement(NamedTuple):
    """Where copies of experts lie; copies are numbered GPU by GPU, node by node.

    Attributes:
        physical_to_logical: `[L, P]` int64: the expert that each copy is of.
        logical_to_physical: `[L, E, most]` int64: the copies of each expert, -1 behind the last.
        replica_counts: `[L, E]` int64: how many copies each expert has.
    """

    physical_to_logical: NDArray[np.int64]
    logical_to_physical: NDArray[np.int64]
    replica_counts: NDArray[np.int64]

    def gpu_loads(self, load: ArrayLike, num_gpus: int) -> NDArray[np.float64]:
        """Return what each GPU gets when an expert's load is shared out evenly to its copies.

        Args:
            load: `[L, E]`: tokens, or anything in proportion.
            num_gpus: how many share the copies.

        Returns:
            `[L, num_gpus]`.
        """
        share = np.asarray(load, np.float64) / self.replica_counts
        copies = np.take_along_axis(share, self.physical_to_logical, axis=1)
        return copies.reshape(len(copies), num_gpus, -1).sum(axis=-1)


def rebalance_experts(
    weight: ArrayLike, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """Choose copies of experts and their places from the load that was seen.

    Where groups of experts can be dealt out to nodes evenly, groups stay whole on a node, so that
    group-limited routing keeps a token's traffic on few nodes (the hierarchical policy, for
    prefill); else experts go anywhere (the global policy, for decoding at a larger scale).

    Args:
        weight: `[L, E]`: load of each expert.
        num_replicas: P, copies in all.
        num_groups: groups that the experts lie in (`n_group`).
        num_nodes: machines.
        num_gpus: GPUs, over all nodes.

    Raises:
        ValueError: a number does not divide another where it must, or P is below E; names both.
    """
    loads = np.asarray(weight, np.float64)
    if loads.ndim != 2 or not loads.size:
        raise ValueError(f"weight has shape {list(loads.shape)}; it must be [layers, experts]")
    experts = loads.shape[1]
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_divides("num_groups", num_groups, "the experts", experts)
    _check_divides("num_nodes", num_nodes, "num_gpus", num_gpus)
    _check_divides("num_gpus", num_gpus, "num_replicas", num_replicas)
    if num_replicas < experts:
        raise ValueError(f"num_replicas is {num_replicas}; each of {experts} experts needs one")
    placed = [_place(layer, num_replicas, num_groups, num_nodes, num_gpus) for layer in loads]
    owners = np.stack([owner for owner, _ in placed])
    counts = np.stack([np.bincount(owner, minlength=experts) for owner in owners])
    copies = np.full((*loads.shape, counts.max()), -1, np.int64)
    for layer, (owner, copy) in enumerate(placed):
        copies[layer, owner, copy] = np.arange(num_replicas)
    return Placement(owners, copies, counts)


def _check_divides(name: str, value: int, whole: str, total: int) -> None:
    if value < 1 or total % value:
        raise ValueError(f"{name} is {value}; it must divide {whole} ({total})")


def _place(
    load: NDArray[np.float64], replicas: int, groups: int, nodes: int, gpus: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each place of one layer, its expert and which copy of it that is."""
    size = len(load) // groups
    owners, copies = [], []
    for node in _pack(load.reshape(groups, size).sum(axis=1), nodes):
        here = (node[:, None] * size + np.arange(size)).ravel()
        owner, copy, counts = _replicate(load[here], replicas // nodes)
        for gpu in _pack((load[here] / counts)[owner], gpus // nodes):
            owners.append(here[owner[gpu]])
            copies.append(copy[gpu])
    return np.concatenate(owners), np.concatenate(copies)


def _pack(weights: NDArray[np.float64], packs: int) -> NDArray[np.int64]:
    """Deal items into packs of one size, the heaviest first, each to the lightest pack.

    Returns:
        `[packs, items / packs]`: the items of each pack, in the order in which they came.
    """
    size = len(weights) // packs
    if size == 1:
        return np.arange(packs)[:, None]
    members: list[list[int]] = [[] for _ in range(packs)]
    total = np.zeros(packs)
    for item in np.argsort(-weights, kind="stable"):
        lightest = min((p for p in range(packs) if len(members[p]) < size), key=lambda p: total[p])
        members[lightest].append(int(item))
        total[lightest] += weights[item]
    return np.array(members, np.int64)


def _replicate(
    load: NDArray[np.float64], replicas: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Copy, again and again, the expert whose copies have most to do.

    Returns:
        Each copy's expert `[replicas]`, which copy of it that is, and each expert's copies.
    """
    counts = np.ones(len(load), np.int64)
    owner, copy = list(range(len(load))), [0] * len(load)
    for _ in range(replicas - len(load)):
        busiest = int(np.argmax(load / counts))
        owner.append(busiest)
        copy.append(int(counts[busiest]))
        counts[busiest] += 1
    return np.array(owner, np.int64), np.array(copy, np.int64), counts
