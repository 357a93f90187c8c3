"""Logging of the server: lines for people, or JSON for a collector."""

from __future__ import annotations

from typing import Any, Literal


def log_config(kind: Literal["text", "json"], *, quiet: bool = False) -> dict[str, Any]:
    """Return what `logging.config.dictConfig` takes.

    Args:
        kind: how lines look.
        quiet: leave out what is no warning.
    """
    formatters: dict[str, Any] = {
        "text": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
        "answers": {
            "format": "%(asctime)s %(route)s %(status)s %(request_id)s key=%(key)s "
            "prompt=%(prompt_tokens)s cached=%(cached_tokens)s written=%(completion_tokens)s "
            "drafted=%(drafted_tokens)s right=%(accepted_tokens)s "
            "first=%(first_token_seconds)ss whole=%(seconds)ss end=%(finish_reason)s"
        },
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
        },
    }
    handlers = {
        name: {"class": "logging.StreamHandler", "formatter": form, "stream": "ext://sys.stderr"}
        for name, form in {
            "lines": kind,
            "answers": "answers" if kind == "text" else "json",
        }.items()
    }
    level = "WARNING" if quiet else "INFO"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": formatters,
        "handlers": handlers,
        "loggers": {
            "ds_serve": {"handlers": ["lines"], "level": level, "propagate": False},
            "ds_serve.requests": {"handlers": ["answers"], "level": level, "propagate": False},
            "uvicorn": {"handlers": ["lines"], "level": level, "propagate": False},
        },
    }
