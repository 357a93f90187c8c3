"""The page that lists OpenAI's fields says of each what the server does with it."""

import re
from pathlib import Path

import pytest

from ds_serve.api.fields import IGNORED, REFUSED
from ds_serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingRequest,
)

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "api.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="docs/ does not lie beside the packages")


def told(section):
    """What the page says of each field in a section, by name."""
    text = PAGE.read_text("utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    found = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            names, what = line.strip("| ").split(" | ", 1)
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), what)
    return found


SECTIONS = {
    "`/v1/completions`": CompletionRequest,
    "`/v1/chat/completions`": ChatRequest,
    "`/v1/embeddings`": EmbeddingRequest,
}


def test_each_supported_field_is_told():
    both = told("Fields of both kinds of completions")
    assert set(SamplingRequest.model_fields) <= set(both)
    for section, request in SECTIONS.items():
        own = set(request.model_fields) - (
            set(SamplingRequest.model_fields) if section != "`/v1/embeddings`" else set()
        )
        here = told(section)
        assert own <= set(here)
        assert all("supported" in here[name] for name in own)


def test_each_other_field_is_told_ignored_or_refused():
    everywhere = {}
    for section in ("Fields of both kinds of completions", *SECTIONS):
        everywhere |= told(section)
    for name in IGNORED:
        assert "ignored" in everywhere[name], name
    for name in REFUSED:
        assert "refused" in everywhere[name], name
    known = set(IGNORED) | set(REFUSED)
    for request in (SamplingRequest, *SECTIONS.values()):
        known |= set(request.model_fields)
    assert set(everywhere) <= known
