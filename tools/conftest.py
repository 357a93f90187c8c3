"""What the tests of the tools share: a workspace of two packages, the lower one released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import interfaces
import notebooks
from workspace import git

PROJECT = """\
[project]
name = "{name}"
version = "0.1.0"
description = "A package to try the tools on"
requires-python = ">=3.11"
dependencies = [{dependencies}]

[tool.poetry]
packages = [{{ include = "{module}", from = "src" }}]

[build-system]
requires = ["poetry-core>=2.1,<3"]
build-backend = "poetry.core.masonry.api"
"""
LOWER = '''"""The lower package."""

__all__ = ["double"]


def double(value: int, times: int = 1) -> int:
    """Return `value` doubled `times` times."""
    return value * 2**times
'''
UPPER = '''"""The upper package."""

from ds_lower import double

__all__ = ["quadruple"]


def quadruple(value: int) -> int:
    """Return four times `value`."""
    return double(value, times=2)
'''


def write_package(root: Path, name: str, code: str, dependencies: str) -> None:
    """Lay down one package of the temporary workspace."""
    module = name.replace("-", "_")
    source = root / "packages" / name / "src" / module
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(code)
    (root / "packages" / name / "CHANGELOG.md").write_text(
        f"# Changelog of {name}\n\n## Unreleased\n\n- A change.\n"
    )
    (root / "packages" / name / "pyproject.toml").write_text(
        PROJECT.format(name=name, module=module, dependencies=dependencies)
    )


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Return a committed workspace of ds-lower, tagged 0.1.0, and ds-upper, which pins it."""
    write_package(tmp_path, "ds-lower", LOWER, "")
    write_package(tmp_path, "ds-upper", UPPER, '"ds-lower>=0.1,<0.2"')
    (tmp_path / ".gitignore").write_text("dist/\n__pycache__/\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_packages = ["ds_lower", "ds_upper"]\n'
        '[[tool.importlinter.contracts]]\nname = "order"\ntype = "layers"\n'
        'layers = ["ds_upper", "ds_lower"]\n'
    )
    interfaces.main(["--write"], tmp_path)
    git("init", "--quiet", root=tmp_path)
    git("config", "user.name", "Test", root=tmp_path)
    git("config", "user.email", "test@example.com", root=tmp_path)
    git("add", ".", root=tmp_path)
    git("commit", "--quiet", "--message", "A workspace", root=tmp_path)
    git("tag", "ds-lower-v0.1.0", root=tmp_path)
    return tmp_path


@pytest.fixture
def lower(repo: Path) -> Path:
    """Return the lower package's one source file."""
    return repo / "packages" / "ds-lower" / "src" / "ds_lower" / "__init__.py"


@pytest.fixture
def upper(repo: Path) -> Path:
    """Return the upper package's one source file."""
    return repo / "packages" / "ds-upper" / "src" / "ds_upper" / "__init__.py"


HEADER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   ds:
#     title: "A try"
#     minutes: {minutes}
#     reading: 5
# ---

# %% [markdown]
# # A try

# %%
"""


@pytest.fixture
def write_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., notebooks.Source]:
    """Return a function that writes a notebook of one cell in a folder of its own."""
    monkeypatch.setattr(notebooks, "SOURCES", tmp_path / "sources")
    monkeypatch.setattr(notebooks, "BUILT", tmp_path / "built")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    # The kernel verifies with a stand-in: TensorFlow takes seconds to import.
    monkeypatch.setattr(
        notebooks, "VERIFY", "import json\nprint(json.dumps(globals().get('wrong', [])))"
    )

    def written(code: str, minutes: float = 1) -> notebooks.Source:
        path = tmp_path / "sources" / "group" / "try.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER.format(minutes=minutes) + code)
        return notebooks.Source.read(path)

    return written
