"""A model as a SavedModel, for programs that have TensorFlow and none of these packages.

Two signatures, both without a state of their own; the caller keeps the cache:

- `prefill(input_ids [B, S] int32, lengths [B] int32, slots [] int32)` reads prompts, padded on the
  right, and gives `logits [B, V]` after each one's last token and `cache [N, B, slots, C + R]`.
- `decode(token [B] int32, lengths [B] int32, cache)` reads one more token of each, which becomes
  number `lengths`, and gives `logits [B, V]` and the cache with it.

The cache is that of arXiv 2405.04434, section 2.1.

Letters: B rows, S prompt, V vocabulary, N layers, C + R numbers of a token in the cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from ds_attention import CausalMask, LatentCache
from ds_model import Window
from ds_precision import stock_operations

if TYPE_CHECKING:
    from ds_model import CausalLM

__all__ = ["export_saved_model"]


def export_saved_model(model: CausalLM, directory: Path | str) -> None:
    """Write a SavedModel with the signatures `prefill` and `decode`.

    It holds stock operations alone. Beside it lies `ds.json`, with the sizes that a caller needs.

    Args:
        model: the model.
        directory: must not exist, or be empty.

    Raises:
        ValueError: the directory has files in it.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} has files in it; name a new directory")
    c = model.config
    row, integer = tf.TensorSpec([None], tf.int32), tf.int32
    cache = tf.TensorSpec(
        [c.num_hidden_layers, None, None, c.attention.cache_width], model.compute_dtype
    )

    def prefill(input_ids: tf.Tensor, lengths: tf.Tensor, slots: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, count = tf.shape(input_ids)[0], tf.shape(input_ids)[1]
        steps = tf.range(count)[None]
        place = Window(steps, CausalMask(steps, count), None, steps)
        h, entries = model.embed_tokens(input_ids), []
        for block in model.blocks:
            empty = LatentCache.allocate(c.attention, rows, count, h.dtype)
            h, written = block.step(h, place, empty, absorb=False)
            entries.append(tf.pad(written.entries, [[0, 0], [0, slots - count], [0, 0]]))
        last = tf.gather(model.norm(h), lengths - 1, batch_dims=1)
        return {"logits": model.head(last), "cache": tf.stack(entries)}

    def decode(token: tf.Tensor, lengths: tf.Tensor, cache: tf.Tensor) -> dict[str, tf.Tensor]:
        slots = lengths[:, None]
        place = Window(slots, CausalMask(slots, tf.shape(cache)[2]), None, slots)
        h, entries = model.embed_tokens(token[:, None]), []
        for block, own in zip(model.blocks, tf.unstack(cache), strict=True):
            h, written = block.step(h, place, LatentCache(own), absorb=True)
            entries.append(written.entries)
        return {"logits": model.head(model.norm(h)[:, 0]), "cache": tf.stack(entries)}

    archive = keras.export.ExportArchive()
    archive.track(model)
    prompts = tf.TensorSpec([None, None], integer)
    with stock_operations():
        archive.add_endpoint("prefill", prefill, [prompts, row, tf.TensorSpec([], integer)])
        archive.add_endpoint("decode", decode, [row, row, cache])
        archive.write_out(str(directory), verbose=False)
    (directory / "ds.json").write_text(json.dumps(_facts(model), indent=1) + "\n", "utf-8")


def _facts(model: CausalLM) -> dict[str, Any]:
    c = model.config
    return {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "num_hidden_layers": c.num_hidden_layers,
        "cache_width": c.attention.cache_width,
        "dtype": model.compute_dtype,
        "eos_token_ids": list(c.eos_token_ids),
    }
