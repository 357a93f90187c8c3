"""The model's configuration: the released `config.json`, typed, checked once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from ds_attention import AttentionConfig, YarnConfig
from ds_model.errors import ConfigError
from ds_moe import MoEConfig

MODEL_TYPES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",  # the same architecture under a name of its own
}
YARN_FIELDS = {field.name for field in fields(YarnConfig)}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the model's shape and arithmetic [V3's values in brackets].

    The names are those of the released `config.json`; `AttentionConfig` and `MoEConfig`
    describe the ones that belong to a layer.

    Attributes:
        vocab_size: rows of the embedding [129280].
        num_hidden_layers: blocks of the main model [61].
        first_k_dense_replace: the first blocks whose feed-forward is dense [3].
        intermediate_size: inner width of a dense feed-forward [18432].
        n_routed_experts: `None` or 0 makes every block dense [256].
        num_nextn_predict_layers: MTP modules [1].
        rms_norm_eps: epsilon of the norms on the residual stream [1e-6]. The norms of the two
            latents use 1e-6 whatever this says, as the reference implementation does.
        rope_scaling: YaRN; a mapping with the released names is accepted too.
        model_type: "deepseek_v3", "deepseek_v2", or "kimi_k2", whose arithmetic is V3's.

    Raises:
        ConfigError: a value is out of range or two do not fit; names the field.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    n_shared_experts: int | None = 1
    n_group: int | None = 1
    topk_group: int | None = 1
    first_k_dense_replace: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: YarnConfig | None = None
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    hidden_act: str = "silu"
    model_type: str = "deepseek_v3"

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", _yarn(self.rope_scaling, self))
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._check()

    def _check(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type is {self.model_type!r}; known: {sorted(MODEL_TYPES)}")
        if self.hidden_act != "silu":
            raise ConfigError(
                f"hidden_act is {self.hidden_act!r}; only 'silu' exists in this family"
            )
        for field in ("vocab_size", "intermediate_size", "num_hidden_layers"):
            value = getattr(self, field)
            if not (isinstance(value, int) and value > 0):
                raise ConfigError(f"{field} is {value!r}; it must be a positive integer")
        for field in ("first_k_dense_replace", "num_nextn_predict_layers"):
            value = getattr(self, field)
            if not (isinstance(value, int) and value >= 0):
                raise ConfigError(f"{field} is {value!r}; it must be 0 or more")
        try:
            _ = self.attention, self.moe
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    @property
    def attention(self) -> AttentionConfig:
        """The attention layers' share of this configuration."""
        names = {field.name for field in fields(AttentionConfig)}
        return AttentionConfig(**{name: getattr(self, name) for name in names})

    @property
    def moe(self) -> MoEConfig | None:
        """The expert layers' share of this configuration; `None` when every block is dense."""
        if not self.n_routed_experts:
            return None
        return MoEConfig(
            hidden_size=self.hidden_size,
            # None is possible in these two; MoEConfig refuses it with a message that names it.
            moe_intermediate_size=self.moe_intermediate_size,  # type: ignore[arg-type]
            n_routed_experts=self.n_routed_experts,
            num_experts_per_tok=self.num_experts_per_tok,  # type: ignore[arg-type]
            n_shared_experts=self.n_shared_experts or 0,
            n_group=self.n_group or 1,
            topk_group=self.topk_group or 1,
            routed_scaling_factor=self.routed_scaling_factor,
            # V2's checkpoints never normalise, and the reference ignores the field there.
            norm_topk_prob=self.norm_topk_prob and self.model_type != "deepseek_v2",
            scoring_func=self.scoring_func,
            topk_method=self.topk_method,
            initializer_range=self.initializer_range,
        )

    def is_moe_layer(self, index: int) -> bool:
        """Say whether block `index` has experts.

        MTP modules count on after the main model and have experts even when no block of the
        main model has.
        """
        first = min(self.first_k_dense_replace, self.num_hidden_layers)
        return bool(self.n_routed_experts) and index >= first

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return replace(self, **changes)

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return a named configuration: "tiny", "mini", "bench", "v2-lite" or "v3-671b".

        Raises:
            ConfigError: there is no such preset; lists those there are.
        """
        from ds_model.presets import PRESETS  # noqa: PLC0415 - presets are made of this class

        if name not in PRESETS:
            raise ConfigError(f"preset is {name!r}; known: {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `config.json` of a Hugging Face directory.

        Raises:
            ConfigError: the file is missing, is not JSON, or holds a value that is not right.
        """
        path = Path(directory) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds {type(values).__name__}; expected a JSON object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a configuration from the contents of a `config.json`.

        Fields that say nothing about the arithmetic (dtype, cache and library settings) are
        passed over.

        Raises:
            ConfigError: a needed field is missing, or a value is not right.
        """
        values = dict(values)
        model_type = values.get("model_type", "deepseek_v3")
        if model_type not in MODEL_TYPES:
            raise ConfigError(f"model_type is {model_type!r}; known: {sorted(MODEL_TYPES)}")
        _read_rope(values)
        if model_type == "deepseek_v2":
            values.setdefault("scoring_func", "softmax")
            values.setdefault("topk_method", "greedy")
            values.setdefault("norm_topk_prob", False)
            values.setdefault("first_k_dense_replace", 0)
        elif values.get("topk_method") is None:
            values["topk_method"] = "noaux_tc"
        unsupported = {"mlp_bias": False, "attention_dropout": 0, "moe_layer_freq": 1}
        for field, expected in unsupported.items():
            if values.get(field, expected) != expected:
                raise ConfigError(f"{field} is {values[field]!r}; only {expected!r} is supported")
        heads = values.get("num_attention_heads")
        if values.get("num_key_value_heads") not in (None, heads):
            raise ConfigError(
                f"num_key_value_heads is {values['num_key_value_heads']!r}; latent attention "
                f"has one per head ({heads!r})"
            )
        known = {field.name for field in fields(cls)}
        if missing := [f for f in _REQUIRED if values.get(f) is None]:
            raise ConfigError(f"config is missing {', '.join(missing)}")
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to `config.json`: the released names and layout."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rope_scaling is not None:
            yarn = {name: getattr(self.rope_scaling, name) for name in YARN_FIELDS}
            defaults = {"attention_factor": None, "mscale": None, "mscale_all_dim": None}
            values["rope_scaling"] = {"type": "yarn", "rope_type": "yarn"} | {
                name: value
                for name, value in sorted(yarn.items())
                if name not in defaults or value is not None
            }
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        values["architectures"] = [MODEL_TYPES[self.model_type]]
        values["num_key_value_heads"] = self.num_attention_heads
        return values


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)


def _read_rope(values: dict[str, Any]) -> None:
    """Bring the two ways of writing RoPE's parameters to the released one, in place."""
    parameters = values.pop("rope_parameters", None)
    if parameters is not None:
        parameters = dict(parameters)
        if parameters.get("rope_theta") is not None:
            values["rope_theta"] = parameters.pop("rope_theta")
        values["rope_scaling"] = parameters
    scaling = values.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "default":
            values["rope_scaling"] = None
        elif kind != "yarn":
            raise ConfigError(f"rope_scaling.rope_type is {kind!r}; known: 'default', 'yarn'")


def _yarn(scaling: Mapping[str, Any], config: ModelConfig) -> YarnConfig:
    """Make a `YarnConfig` of a released `rope_scaling` mapping."""
    values = {name: scaling[name] for name in YARN_FIELDS if scaling.get(name) is not None}
    length = values.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    values.setdefault("factor", config.max_position_embeddings / length)
    try:
        return YarnConfig(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
