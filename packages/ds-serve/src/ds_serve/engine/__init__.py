"""The engine: requests in, tokens out; knows nothing of HTTP."""

from ds_serve.engine.engine import BusyError, ClosedError, Engine, EngineOptions, StepReport
from ds_serve.engine.grammar import COMPACT, Grammar, GrammarError, Grammars
from ds_serve.engine.text import Rules, Text, Token, Update

__all__ = [
    "COMPACT",
    "BusyError",
    "ClosedError",
    "Engine",
    "EngineOptions",
    "Grammar",
    "GrammarError",
    "Grammars",
    "Rules",
    "StepReport",
    "Text",
    "Token",
    "Update",
]
