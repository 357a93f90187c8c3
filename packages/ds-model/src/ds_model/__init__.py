"""DeepSeek-V3 as a Keras model that reads and writes the released layout."""

from ds_model.block import Window
from ds_model.causal_lm import CausalLM, ModelOutput
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError, ConfigError, TokenizerError
from ds_model.generate import GenerationStats
from ds_model.paged import PagedCache, PagedOutput, draft_pages, read_pages
from ds_model.parameters import parameter_counts, parameters_by_part
from ds_model.part import ModelPart
from ds_model.recompute import Recompute
from ds_model.tokenizer import Tokenizer

__all__ = [
    "CausalLM",
    "CheckpointError",
    "ConfigError",
    "GenerationStats",
    "ModelConfig",
    "ModelOutput",
    "ModelPart",
    "PagedCache",
    "PagedOutput",
    "Recompute",
    "Tokenizer",
    "TokenizerError",
    "Window",
    "draft_pages",
    "parameter_counts",
    "parameters_by_part",
    "read_pages",
]
