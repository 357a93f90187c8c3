"""Text from a trained model, written plainly and with MTP drafting."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_model import CausalLM, Tokenizer


@dataclass(frozen=True)
class WritingSample:
    """A prompt continued greedily, twice, and once by drawing.

    Attributes:
        prompt: What was given.
        text: What the model added, one token a pass.
        drawn: What it adds when tokens are drawn (temperature 0.8, nucleus 0.95).
        identical: Whether drafting gave the same tokens.
        tokens: New tokens.
        passes: Passes of the model with drafting; without, one a token.
        drafted: Tokens that the MTP modules guessed.
        accepted: Guesses that the model itself would have written.
    """

    prompt: str
    text: str
    drawn: str
    identical: bool
    tokens: int
    passes: int
    drafted: int
    accepted: int


def write(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[WritingSample]:
    """Continue each prompt greedily, without and with MTP drafting, and by drawing.

    Without MTP modules in the model there are no drafts, and the two are one.
    """
    samples = []
    for prompt in prompts:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = np.asarray([[*start, *tokenizer.encode(prompt)]], np.int32)
        plain = model.generate(ids, max_new_tokens=max_new_tokens).numpy()
        drafted = plain
        if model.mtp:
            drafted = model.generate(ids, max_new_tokens=max_new_tokens, draft=True).numpy()
        stats = model.last_generation
        drawn = model.generate(
            ids, max_new_tokens=max_new_tokens, temperature=0.8, top_p=0.95, seed=0
        ).numpy()
        new = plain[0, ids.shape[1] :]
        samples.append(
            WritingSample(
                prompt=prompt,
                text=tokenizer.decode(new.tolist()),
                drawn=tokenizer.decode(drawn[0, ids.shape[1] :].tolist()),
                identical=bool(np.array_equal(plain, drafted)),
                tokens=stats.new_tokens,
                passes=stats.steps,
                drafted=stats.drafted,
                accepted=stats.accepted,
            )
        )
    return samples
