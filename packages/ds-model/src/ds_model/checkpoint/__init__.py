"""Checkpoints in the released Hugging Face layout, read and written without `transformers`."""

from ds_model.checkpoint.checking import mtp_depth_present
from ds_model.checkpoint.loading import load_into
from ds_model.checkpoint.saving import save
from ds_model.checkpoint.unwritten import unwritten

__all__ = ["load_into", "mtp_depth_present", "save", "unwritten"]
