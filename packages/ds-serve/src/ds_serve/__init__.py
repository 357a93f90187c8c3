"""Serve a DeepSeek-V3 over HTTP, as OpenAI's clients speak it."""

from ds_serve.app import create_app
from ds_serve.limits import Limits

__all__ = ["Limits", "create_app"]
