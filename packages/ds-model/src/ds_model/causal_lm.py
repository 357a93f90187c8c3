"""The language model: embedding, blocks, norm, head, and the MTP modules beside them.

arXiv 2412.19437, section 2. Shape letters: B batch, S sequence, D hidden_size, V vocab_size,
E experts, k MTP depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

from ds_attention import CausalMask, RMSNorm
from ds_model.block import DecoderBlock, MTPModule, Window
from ds_model.checkpoint import load_into, mtp_depth_present, save, unwritten
from ds_model.checkpoint.layout import layout
from ds_model.checkpoint.loading import put_small, value_at
from ds_model.checkpoint.small import STORED, small_form
from ds_model.config import ModelConfig
from ds_model.fit import training_step
from ds_model.generate import GenerationStats, Generator
from ds_model.part import ModelPart
from ds_model.recompute import Recompute, check_recompute, run_block
from ds_moe import MixtureOfExperts, Placement, Routing
from ds_precision import (
    Linear,
    check_mode,
    matmul,
    quantize_weights,
    takes_any_mode,
    without_fp8,
)

_SMALL_DTYPES = ("int8", "uint8", "float8_e4m3fn")


class ModelOutput(NamedTuple):
    """What one pass gives.

    Attributes:
        logits: `[B, S, V]` float32: position i predicts token i + 1. With `logits_to_keep` the
            last so many positions alone.
        mtp_logits: depth k (from 1) is `[B, S - k, V]` float32: position i predicts token
            i + k + 1. Empty unless asked for; cut short as `logits` is.
        routings: one for each expert layer, in the order of `CausalLM.moe_layers`.
    """

    logits: tf.Tensor
    mtp_logits: tuple[tf.Tensor, ...]
    routings: tuple[Routing, ...]


@keras.saving.register_keras_serializable(package="ds_model")
class CausalLM(keras.Model):
    """DeepSeek-V3 (and V2) for text.

    A `keras.Model` like any other: `summary`, `compile`, `fit`, callbacks and `.keras` files
    work; `fit` also balances the experts (see `bias_update_speed`). The weights exist as soon
    as the model is made.

    Args:
        config: sizes and rules; the mapping that `ModelConfig.to_dict` returns is accepted too.
        bias_update_speed: gamma of the loss-free balancing that `fit` does after each
            optimizer step [0.001]; 0 leaves the biases alone.
        part: which layers have their weights here, where machines share a model; all if `None`.
            They are drawn as in the whole model. A part offers `run_blocks` and `finish`, and none
            of what needs the whole: calls, text, files.
        **kwargs: of `keras.Model` (name, dtype policy).
    """

    def __init__(
        self,
        config: ModelConfig | dict[str, Any],
        bias_update_speed: float = 0.001,
        part: ModelPart | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        takes_any_mode(self)
        self.config = config if isinstance(config, ModelConfig) else ModelConfig.from_dict(config)
        self.bias_update_speed = bias_update_speed
        c, policy = self.config, self.dtype_policy
        self._part = part or ModelPart(tuple(range(c.num_hidden_layers)))
        self.embed_tokens = keras.layers.Embedding(
            c.vocab_size,
            c.hidden_size,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=c.initializer_range),
            dtype=without_fp8(policy),
            name="embed_tokens",
        )
        self.blocks = [
            DecoderBlock(c, c.is_moe_layer(i), dtype=policy, name=f"block_{i}")
            for i in range(c.num_hidden_layers)
        ]
        self.norm = RMSNorm(c.rms_norm_eps, dtype=policy, name="norm")
        self.lm_head = None
        if not c.tie_word_embeddings:
            self.lm_head = Linear(
                c.vocab_size,
                initializer_range=c.initializer_range,
                dtype=without_fp8(policy),
                name="lm_head",
            )
        self.mtp = [
            MTPModule(c, dtype=policy, name=f"mtp_{k}") for k in range(c.num_nextn_predict_layers)
        ]
        if self._part.expert_ranks is not None:
            for layer in self.moe_layers:
                layer.deal_out(self._part.expert_ranks)
        self.build((None, None))

    def build(self, input_shape: Any) -> None:  # noqa: ARG002 - Keras hands it over
        """Create every weight; the input's shape does not matter."""
        if self.built:
            return
        part, shape = self._part, (None, None, self.config.hidden_size)
        if part.embedding:
            self.embed_tokens.build((None, None))
        end: list[keras.layers.Layer] = [self.norm, *self.mtp]
        end += [] if self.lm_head is None else [self.lm_head]
        layers: list[tuple[keras.layers.Layer, bool]] = [
            *((block, i in part.blocks) for i, block in enumerate(self.blocks)),
            *((layer, part.end) for layer in end),
        ]
        for layer, here in layers:
            if here:
                layer.build(shape)
            else:
                _pass_over(layer, shape)
        self.built: bool = True

    @property
    def moe_layers(self) -> list[MixtureOfExperts]:
        """The layers with experts: the blocks' in order, then the MTP modules'.

        Of a part those too whose weights are elsewhere.
        """
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        return [block.mlp for block in blocks if block.moe]

    def place_experts(self, placement: Placement) -> None:
        """Let busy experts lie on several ranks, for inference (arXiv 2412.19437, section 3.4.1).

        For a model whose experts are dealt out (`ModelPart.expert_ranks`). All ranks call it
        together, and may do so again as the load changes: weights move, outputs stay.

        Args:
            placement: of `rebalance_experts`, a layer a row, as `moe_layers` has them.

        Raises:
            ValueError: the placement is of another number of layers, or does not fit the ranks.
        """
        rows, layers = placement.physical_to_logical, self.moe_layers
        if len(rows) != len(layers):
            raise ValueError(f"placement is of {len(rows)} layers; {len(layers)} have experts")
        for layer, row in zip(layers, rows, strict=True):
            if layer.built:
                layer.place(row)

    def call(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        training: bool = False,
        logits_to_keep: int = 0,
    ) -> tf.Tensor:
        """Return logits `[B, S, V]` in float32, or `[B, logits_to_keep, V]`.

        Args:
            input_ids: `[B, S]` integer.
            attention_mask: `[B, S]`; 0 is padding, left or right.
            training: makes no difference to the arithmetic.
            logits_to_keep: the head sees the last so many positions alone, padding included, as
                in `transformers`; 0 is all.
        """
        return self.forward(
            input_ids, attention_mask, training, logits_to_keep=logits_to_keep
        ).logits

    def forward(
        self,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        training: bool = False,  # noqa: ARG002 - no dropout in this family
        mtp: bool = False,
        recompute: Recompute = "none",
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Do one pass and return all that comes of it; arguments as for `call`.

        Args:
            input_ids: `[B, S]` integer.
            attention_mask: `[B, S]`; 0 is padding, left or right.
            training: makes no difference to the arithmetic.
            mtp: run the MTP modules too.
            recompute: what blocks and MTP modules compute again in the backward pass to hold less
                until then: "none"; "parts": norms, queries, keys and values of attention; "block":
                all but their input.
            logits_to_keep: how many positions, from the end, the heads see; 0 is all.

        Raises:
            ValueError: no such policy; `logits_to_keep` is negative.
        """
        check_recompute(recompute)
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; it must be 0 (all) or more")
        input_ids = tf.convert_to_tensor(input_ids)
        if attention_mask is not None:
            attention_mask = tf.cast(attention_mask, tf.int32)
        h, routings = self.run_blocks(self.embed_tokens(input_ids), attention_mask, recompute)
        output = self.finish(h, input_ids, attention_mask, mtp, recompute, logits_to_keep)
        return output._replace(routings=(*routings, *output.routings))

    def run_blocks(
        self,
        h: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        recompute: Recompute = "none",
        numbers: Sequence[int] | None = None,
    ) -> tuple[tf.Tensor, tuple[Routing, ...]]:
        """Run blocks one after the other.

        Args:
            h: `[B, S, D]`.
            attention_mask: `[B, S]` int32; 0 is padding.
            recompute: as for `forward`.
            numbers: which blocks, counted in the whole model; all if `None`.

        Returns:
            `[B, S, D]` and a routing for each that has experts.
        """
        window = _window(h, attention_mask)
        routings = []
        for i in range(len(self.blocks)) if numbers is None else numbers:
            h, routing = run_block(self.blocks[i], window, recompute, h)
            if routing is not None:
                routings.append(routing)
        return h, tuple(routings)

    def finish(
        self,
        h: tf.Tensor,
        input_ids: tf.Tensor,
        attention_mask: tf.Tensor | None = None,
        mtp: bool = False,
        recompute: Recompute = "none",
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        """Do what follows the last block: its norm, the head, the MTP modules.

        Args:
            h: `[B, S, D]`: what the last block gave.
            input_ids: `[B, S]` integer: what the first was given.
            attention_mask: `[B, S]` int32; 0 is padding.
            mtp: as for `forward`.
            recompute: as for `forward`.
            logits_to_keep: as for `forward`.

        Returns:
            The logits, and the routings of the MTP modules alone.
        """
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        h = self.norm(h)
        logits = self.head(h[:, kept])
        mtp_logits, routings = [], []
        for k, module in enumerate(self.mtp if mtp else (), start=1):
            window = _shifted(attention_mask, input_ids, k)
            embedded = self.embed_tokens(input_ids[:, k:])
            h, routing = run_block(module, window, recompute, h[:, :-1], embedded)
            if routing is not None:
                routings.append(routing)
            mtp_logits.append(self.head(h[:, kept]))
        return ModelOutput(logits, tuple(mtp_logits), tuple(routings))

    def head(self, h: tf.Tensor) -> tf.Tensor:
        """Map normed hidden states `[..., D]` to logits `[..., V]` in float32."""
        if self.lm_head is not None:
            return tf.cast(self.lm_head(h), tf.float32)
        embeddings = tf.convert_to_tensor(self.embed_tokens.embeddings)
        return tf.cast(matmul(h, tf.transpose(embeddings)), tf.float32)

    def mtp_logits(
        self, input_ids: tf.Tensor, attention_mask: tf.Tensor | None = None
    ) -> list[tf.Tensor]:
        """Return the MTP modules' logits.

        Args:
            input_ids: `[B, S]` integer.
            attention_mask: `[B, S]`; 0 is padding.

        Returns:
            For depth k (from 1) `[B, S - k, V]` float32: position i predicts token i + k + 1.
        """
        return list(self.forward(input_ids, attention_mask, mtp=True).mtp_logits)

    def generate(self, input_ids: tf.Tensor, *args: Any, **kwargs: Any) -> tf.Tensor:
        """Continue each row; see `Generator.stream` for the arguments.

        Returns:
            `[B, S + new]` int32, the prompt included. A row that ended early is filled with
            `pad_token_id`, or its end token where there is none.
        """
        prompt = np.asarray(input_ids, np.int32)
        chunks = list(self.stream(prompt, *args, **kwargs))
        return tf.constant(np.concatenate([prompt, *chunks], axis=1))

    def stream(self, input_ids: tf.Tensor, *args: Any, **kwargs: Any) -> Iterator[np.ndarray]:
        """Yield new tokens `[B, n]` as they come; see `Generator.stream`."""
        return self._generator.stream(input_ids, *args, **kwargs)

    @property
    def last_generation(self) -> GenerationStats:
        """What the last `generate` or `stream` did."""
        return self._generator.stats

    @property
    def _generator(self) -> Generator:
        found = self.__dict__.get("_generator_made")
        if found is None:
            found = Generator(self)
            # Past Keras' attribute tracking: compiled functions are no part of the model.
            self.__dict__["_generator_made"] = found
        return found

    def quantize(self, mode: str = "int8", **_: Any) -> None:
        """Keep experts, projections and head in 8 or 4 bits, for serving.

        Embedding, norms, routers and `kv_b_proj`, which decoding takes apart, stay as they are; so
        do the head and the MTP modules' projections in "fp8", where the released files keep them.
        In "int4" the head takes "int8". The model can't be trained or saved any more; files of
        small weights are what `ds-model quantize` writes.

        Args:
            mode: "int8", "int8_channel", "int4" or "fp8"; see `ds_precision.quantize_weights`.
            **_: what else Keras hands over.

        Raises:
            ValueError: another mode; a width that is not a multiple of 32, but for "fp8"; a weight
                that is not finite.
        """
        check_mode(mode)
        for entry in layout(self.config):
            weight = value_at(self, entry.path)
            if weight is not None and (form := small_form(entry, mode)):
                put_small(self, entry, quantize_weights(weight, form))
        self.__dict__.pop("_generator_made", None)  # its graphs hold the old weights

    def compile(self, *args: Any, jit_compile: bool | str = "auto", **kwargs: Any) -> None:
        """Configure `fit` as Keras does, but compile with XLA only if told to.

        Keras' "auto" would. Experts run faster in graph mode on CPU, where XLA has to pad
        their rows; `jit_compile=True` works and gives the same numbers.
        """
        super().compile(*args, jit_compile=jit_compile is True, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a `.keras` file says; Keras leaves this to models with their own `compile`."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Do one step of Keras' `fit`, expert balancing included."""
        return training_step(self, data)

    @classmethod
    def from_pretrained(cls, path: str | Path, quantize: str | None = None, **kwargs: Any) -> Self:
        """Load a Hugging Face directory (`config.json`, safetensors).

        An MTP module that config.json announces and that no tensor belongs to is left out,
        with a notice: `transformers` writes such directories.

        Args:
            path: the directory; small weights in it are read as the floating numbers they mean.
            quantize: keep weights small, for serving: a mode of `quantize`, or "stored" for what
                the files hold. Weights that lie in the files in that mode are taken as they are.
            **kwargs: of the constructor, `dtype` among them.

        Raises:
            ConfigError: config.json is missing or wrong.
            CheckpointError: a tensor is missing, unused, misshapen or unreadable.
            ValueError: no such mode, or one that does not fit; see `quantize`.
        """
        if quantize not in (None, STORED):
            check_mode(quantize)
        config = ModelConfig.from_pretrained(path)
        depth = mtp_depth_present(path, config)
        with unwritten() as made:
            model = cls(config.replace(num_nextn_predict_layers=depth), **kwargs)
        made.draw_all_but(load_into(model, path, quantize))
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write a Hugging Face directory that `transformers` opens.

        Raises:
            CheckpointError: the directory can't be written.
            ValueError: the model has small weights.
        """
        if any(weight.dtype in _SMALL_DTYPES for weight in self.weights):
            raise ValueError(
                "the model has small weights and only floating ones can be saved; "
                "`ds-model quantize` writes files of small ones"
            )
        save(self, path)

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs to make an equal model."""
        return super().get_config() | {
            "config": self.config.to_dict(),
            "bias_update_speed": self.bias_update_speed,
        }


def _pass_over(layer: keras.layers.Layer, shape: tuple[int | None, ...]) -> None:
    """Draw what the layer's weights would be drawn from, so that the next ones get theirs.

    Each initializer without a seed takes the next number of Python's generator. So a twin is built,
    of memory that nobody touches.
    """
    with unwritten():
        type(layer).from_config(layer.get_config()).build(shape)


def _window(tokens: tf.Tensor, attention_mask: tf.Tensor | None) -> Window:
    """Say where the tokens of a whole sequence, `[B, S, ...]`, lie."""
    length = tf.shape(tokens)[1]
    slots = tf.range(length)[None]
    allowed = CausalMask(slots, length, attention_mask)
    if attention_mask is None:
        return Window(slots, allowed)
    # Padding gets the position of its neighbour; nothing looks at it.
    positions = tf.maximum(tf.cumsum(attention_mask, axis=1) - 1, 0)
    return Window(positions, allowed, attention_mask)


def _shifted(attention_mask: tf.Tensor | None, input_ids: tf.Tensor, k: int) -> Window:
    """Say where depth k's positions lie: those that have a token k ahead."""
    if attention_mask is None:
        return _window(input_ids[:, k:], None)
    return _window(input_ids[:, k:], attention_mask[:, :-k] * attention_mask[:, k:])
