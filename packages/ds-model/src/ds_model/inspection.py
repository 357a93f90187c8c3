"""What a checkpoint or a preset is, from `config.json` and file headers: no weight is read."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ds_attention import memory_report
from ds_model.checkpoint.checking import check_layout, present_depth
from ds_model.checkpoint.reader import TensorFiles
from ds_model.checkpoint.small import modes_of
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError
from ds_model.parameters import ParameterCounts, parameter_counts
from ds_model.presets import PRESETS

ACTIVE_RULE = (
    "main model without the routed experts that a token is not sent to and without the "
    "embedding table (unless it is the head too)"
)


@dataclass(frozen=True)
class Inspection:
    """The answer of `ds-model inspect`.

    Attributes:
        name: the directory or the preset.
        family: `model_type` of its configuration.
        layers: blocks of the main model.
        mtp_depth: MTP modules there are.
        parameters: exact counts, by the rules of `parameter_counts`.
        active_rule: what counts as active.
        dtypes: number of stored values of each dtype, copies included; empty for a preset.
        weight_bytes: of the stored tensors; for a preset of all parameters in BF16.
        cache_dtype: of the two figures that follow.
        cache_bytes_per_token: latent cache, all layers of the main model.
        mha_cache_bytes_per_token: standard attention's, same heads and layers.
        serving: bytes of the weights in memory, by the way they are held: "bfloat16", or a mode of
            `CausalLM.quantize`.
        problem: why the directory can't be loaded, or `None`.
    """

    name: str
    family: str
    layers: int
    mtp_depth: int
    parameters: ParameterCounts
    active_rule: str
    dtypes: dict[str, int]
    weight_bytes: int
    cache_dtype: str
    cache_bytes_per_token: int
    mha_cache_bytes_per_token: int
    serving: dict[str, int]
    problem: str | None

    @property
    def cache_saving(self) -> float:
        """Share of the standard cache that is not needed."""
        return 1 - self.cache_bytes_per_token / self.mha_cache_bytes_per_token


def inspect(target: str | Path) -> Inspection:
    """Describe a directory, or a preset if there is no such directory.

    Raises:
        CheckpointError: neither a directory nor a preset; weights that can't be opened.
        ConfigError: `config.json` is missing or wrong.
    """
    if Path(target).is_dir():
        return _inspect_directory(Path(target))
    if str(target) in PRESETS:
        config = ModelConfig.preset(str(target))
        counts = parameter_counts(config)
        values = counts.main + counts.router_bias + counts.mtp
        return _describe(str(target), config, {}, 2 * values, None)
    known = ", ".join(PRESETS)
    raise CheckpointError(f"{target} is no directory, and no preset (those are {known})")


def _inspect_directory(directory: Path) -> Inspection:
    config = ModelConfig.from_pretrained(directory)
    dtypes: Counter[str] = Counter()
    problem = None
    with TensorFiles(directory) as files:
        depth = present_depth(files, config)
        config = config.replace(num_nextn_predict_layers=depth)
        for name in files.names:
            dtypes[files.dtype(name)] += prod(files.shape(name))
        size = files.nbytes
        try:
            check_layout(files, config)
        except CheckpointError as error:
            problem = str(error)
    return _describe(str(directory), config, dict(dtypes), size, problem)


def _describe(
    name: str, config: ModelConfig, dtypes: dict[str, int], size: int, problem: str | None
) -> Inspection:
    cache_dtype = "bfloat16"
    cache = memory_report(config.attention, batch=1, length=1, dtype=cache_dtype)
    return Inspection(
        name=name,
        family=config.model_type,
        layers=config.num_hidden_layers,
        mtp_depth=config.num_nextn_predict_layers,
        parameters=parameter_counts(config),
        active_rule=ACTIVE_RULE,
        dtypes=dtypes,
        weight_bytes=size,
        cache_dtype=cache_dtype,
        cache_bytes_per_token=cache.mla_bytes * config.num_hidden_layers,
        mha_cache_bytes_per_token=cache.mha_bytes * config.num_hidden_layers,
        serving=dict(modes_of(config)),
        problem=problem,
    )
