"""Public names say shapes and source; what says neither is named."""

from __future__ import annotations

import pytest

import docstrings

GOOD = '''"""A module (arXiv 2412.19437, section 2.1)."""

import tensorflow as tf

__all__ = ["Layer", "double"]


def double(x: tf.Tensor) -> tf.Tensor:
    """Return twice `x [batch, sequence]`."""
    return 2 * x


class Layer:
    """A layer."""

    width = 3

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Map `[batch, width]` to the same."""
        return x

    @property
    def size(self) -> int:
        """Bytes."""
        return 1

    def _own(self, x: tf.Tensor) -> tf.Tensor:
        return x
'''


def found(tmp_path, code):
    folder = tmp_path / "ds_some"
    folder.mkdir()
    (folder / "__init__.py").write_text(code)
    return list(docstrings.problems("ds_some", tmp_path))


def test_the_workspace_says_all(capsys):
    assert docstrings.main() == 0
    assert "each public name" in capsys.readouterr().out


def test_what_says_all_passes(tmp_path):
    assert found(tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("`x [batch, sequence]`", "x", "ds_some.double: takes or gives tensors and tells no shape"),
        ('"""Return twice `x [batch, sequence]`."""', "", "ds_some.double: has no docstring"),
        ('"""Bytes."""', "", "ds_some.Layer.size: has no docstring"),
        ("`[batch, width]`", "it", "ds_some.Layer.call: takes or gives tensors and tells no shape"),
        (" (arXiv 2412.19437, section 2.1)", "", "neither it nor ds_some names a source"),
    ],
)
def test_what_is_missing_is_named(tmp_path, old, new, said):
    assert any(said in line for line in found(tmp_path, GOOD.replace(old, new)))
