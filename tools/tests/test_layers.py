"""The layer check fails on an import upwards and on one past a sibling's public names."""

from __future__ import annotations

import sys

import pytest

import layers


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))


def test_the_workspace_as_it_is_passes(repo):
    assert layers.main(repo) == 0


def test_an_import_upwards_fails(repo, lower, capsys):
    lower.write_text(lower.read_text() + "\nfrom ds_upper import quadruple\n")
    assert layers.main(repo) == 1
    assert "ds_lower is not allowed to import ds_upper" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("from ds_lower.hidden import secret", "ds_lower.hidden"),
        ("import ds_lower.hidden", "ds_lower.hidden"),
        ("from ds_lower import secret", "ds_lower.secret"),
    ],
)
def test_an_import_past_the_public_names_fails(repo, upper, capsys, line, named):
    (repo / "packages/ds-lower/src/ds_lower/hidden.py").write_text("secret = 1\n")
    upper.write_text(f"{line}\n{upper.read_text()}")
    assert layers.main(repo) == 1
    assert f":1: {named} is not public: see ds_lower.__all__" in capsys.readouterr().out
