"""Greedy text, token for token over 64 tokens, padded rows included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference_cases import BY_NAME, CASES, NEW_TOKENS, Case

from parity import pairs, peer
from parity.measure import TIE

NEVER: tuple[int, ...] = ()  # no token ends a row


def assert_same_text(case: Case, mine: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> None:
    """Allow a row to leave the reference only where its two best logits nearly tie."""
    assert mine.shape == theirs.shape
    full = np.concatenate([mask, np.ones((len(mask), mine.shape[1] - mask.shape[1]))], axis=1)
    for row in range(len(mine)):
        parted = np.flatnonzero(mine[row] != theirs[row])
        if parted.size:
            at = int(parted[0])
            before = slice(row, row + 1), slice(0, at)
            run = peer.forward(pairs.peer_of(case), theirs[before], full[before].astype(np.int32))
            best = np.sort(run.logits[0, -1])[-2:]
            assert best[1] - best[0] < TIE, f"row {row} parts at {at}, which is no tie: {best}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy(case: Case) -> None:
    ids, mask = case.batch()
    mine = (
        pairs.ours_of(case)
        .generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=NEVER)
        .numpy()
    )
    assert_same_text(case, mine, pairs.peer_greedy(case), mask)


@pytest.mark.parametrize("name", ["yarn-only-all-dim", "v2-group-limited"])
def test_defaults_end_where_transformers_ends(name: str) -> None:
    """Both take the end token from config.json, and fill with it for want of a padding token."""
    case = BY_NAME[name]
    ids, mask = case.batch()
    theirs = pairs.peer_of(case).generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    assert (theirs[:, ids.shape[1] :] == case.config["eos_token_id"]).any(dim=1).all()
    mine = pairs.ours_of(case).generate(ids, mask, max_new_tokens=NEW_TOKENS)
    np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_stops_where_transformers_stops() -> None:
    """A row that ended is filled with the padding token while the others go on."""
    case = BY_NAME["left-padded"]
    ids, mask = case.batch()
    width, pad = ids.shape[1], case.config["pad_token_id"]
    # The sixth new token of the first row ends a row, wherever it comes.
    end = int(pairs.peer_greedy(case)[0, width + 5])
    theirs = pairs.peer_of(case).generate(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
    mine = pairs.ours_of(case).generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=end)
    assert (theirs[0, width + 6 :] == pad).all()
    np.testing.assert_array_equal(mine.numpy(), theirs.numpy())


def test_prompt_tokens_equal_to_padding_are_tokens() -> None:
    case = BY_NAME["left-padded"]
    ids, mask = case.batch()
    ids[:, -4] = case.config["pad_token_id"]
    theirs = peer.greedy(pairs.peer_of(case), ids, mask, NEW_TOKENS)
    mine = (
        pairs.ours_of(case)
        .generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=NEVER)
        .numpy()
    )
    assert_same_text(case, mine, theirs, mask)


@pytest.mark.parametrize("case", pairs.DEEP, ids=lambda case: case.name)
def test_drafting_changes_nothing(case: Case) -> None:
    ids, mask = case.batch()
    model = pairs.ours_of(case)
    mine = model.generate(
        ids[:1], mask[:1], max_new_tokens=NEW_TOKENS, eos_token_id=NEVER, draft=True
    ).numpy()
    assert_same_text(case, mine, pairs.peer_greedy(case)[:1], mask[:1])
    assert model.last_generation.drafted > 0
