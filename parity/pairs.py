"""The same checkpoint opened by both sides, once a run."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch
from reference_cases import CASES, NEW_TOKENS, Case
from reference_weights import write_checkpoint

from ds_model import CausalLM
from parity import peer

DEEP = tuple(case for case in CASES if case.depth)
"""The cases with MTP modules."""


@functools.cache
def folder_of(case: Case) -> Path:
    """Return a directory with the case's checkpoint, in the released layout."""
    return write_checkpoint(case, Path(_scratch().name) / case.name)


@functools.cache
def saved_by_peer(case: Case) -> Path:
    """Return a directory that `transformers` wrote of the case's checkpoint."""
    folder = Path(_scratch().name) / f"{case.name}-saved-by-transformers"
    peer_of(case).save_pretrained(folder)
    return folder


@functools.cache
def peer_of(case: Case) -> torch.nn.Module:
    """Return the case's model in `transformers`."""
    return peer.load(folder_of(case))


@functools.cache
def ours_of(case: Case) -> CausalLM:
    """Return the case's model here."""
    return CausalLM.from_pretrained(folder_of(case))


@functools.cache
def peer_forward(case: Case) -> peer.Forward:
    """Return the reference's pass over the case's batch."""
    return peer.forward(peer_of(case), *case.batch())


@functools.cache
def peer_greedy(case: Case) -> np.ndarray:
    """Return the reference's greedy continuation of the case's batch."""
    return peer.greedy(peer_of(case), *case.batch(), NEW_TOKENS)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="parity-")
