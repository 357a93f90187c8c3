"""Serve a DeepSeek-V3 over HTTP to many clients at once, as OpenAI's clients speak it."""

from ds_serve.api.app import create_app
from ds_serve.api.keys import Keys
from ds_serve.api.limits import Limits
from ds_serve.engine import Engine, EngineOptions, Rules, StepReport, Text, Token, Update

__all__ = [
    "Engine",
    "EngineOptions",
    "Keys",
    "Limits",
    "Rules",
    "StepReport",
    "Text",
    "Token",
    "Update",
    "create_app",
]
