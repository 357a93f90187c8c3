"""The MTP modules against `MtpLayer`s built by hand of the same checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
from reference_cases import Case
from reference_weights import weights

from parity import pairs, peer
from parity.measure import LOGITS, relative


@pytest.mark.parametrize("case", pairs.DEEP, ids=lambda case: case.name)
def test_logits(case: Case) -> None:
    ids, _ = case.batch()
    expected, _ = peer.mtp_logits(pairs.peer_of(case), weights(case), ids)
    mine = pairs.ours_of(case).mtp_logits(ids)
    assert len(mine) == len(expected) == case.depth
    for depth, (logits, theirs) in enumerate(zip(mine, expected, strict=True), start=1):
        assert relative(logits.numpy(), theirs) < LOGITS, f"depth {depth}"


@pytest.mark.parametrize("case", pairs.DEEP, ids=lambda case: case.name)
def test_left_padding_changes_nothing(case: Case) -> None:
    ids, _ = case.batch()
    expected, _ = peer.mtp_logits(pairs.peer_of(case), weights(case), ids)
    gap = np.zeros((len(ids), 5), np.int32)
    padded, mask = np.concatenate([gap, ids], axis=1), np.concatenate([gap, ids * 0 + 1], axis=1)
    for logits, theirs in zip(pairs.ours_of(case).mtp_logits(padded, mask), expected, strict=True):
        assert relative(logits.numpy()[:, 5:], theirs) < LOGITS
