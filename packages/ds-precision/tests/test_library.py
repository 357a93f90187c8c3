"""Where the compiled operations come from, and what happens where they can't be had."""

import logging
import os
import shutil
import stat

import pytest
import tensorflow as tf

from ds_precision import matmul, use_kernels
from ds_precision.kernels import kernels, library
from ds_precision.kernels.library import compiled


@pytest.fixture
def fresh():
    kernels.cache_clear()
    yield
    kernels.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_off_means_stock_operations_with_the_same_product(monkeypatch):
    monkeypatch.setenv("DS_PRECISION_KERNELS", "off")
    x = tf.constant([[1.0, 2.0]])

    assert not use_kernels(x)
    assert matmul(x, tf.constant([[3.0], [4.0]])).numpy().tolist() == [[11.0]]


@pytest.mark.usefixtures("fresh")
def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv("DS_PRECISION_KERNELS", "fast")
    with pytest.raises(ValueError, match="DS_PRECISION_KERNELS is 'fast'; it must be 'auto', 'on'"):
        kernels()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("setting", "served"), [("auto", False), ("on", True)])
def test_without_avx512_they_serve_only_when_asked_for(monkeypatch, setting, served):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setenv("DS_PRECISION_KERNELS", setting)
    here = compiled()
    monkeypatch.setattr(library, "compiled", lambda: here)
    monkeypatch.setattr(library, "_processor", lambda: "flags : fma avx2")

    assert (kernels() is not None) == served


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_one_line_says_so_and_stock_operations_run(
    monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("DS_PRECISION_KERNELS", "on")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING, "ds_precision"):
        assert kernels() is None

    (record,) = caplog.records
    assert "no C++ compiler" in record.getMessage()


@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot do this >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(broken.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("DS_PRECISION_KERNELS", "on")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with caplog.at_level(logging.WARNING, "ds_precision"):
        assert kernels() is None
    assert "cannot do this" in caplog.text
    assert not [name for _, _, names in os.walk(tmp_path / "cache") for name in names]


@pytest.mark.skipif(kernels() is None, reason="no compiled operations here")
def test_what_was_compiled_once_is_taken_from_the_cache(monkeypatch):
    first = compiled()
    monkeypatch.setattr("subprocess.run", None)

    assert compiled() == first


@pytest.mark.skipif(kernels() is None, reason="no compiled operations here")
def test_xla_and_other_types_take_stock_operations():
    x = tf.ones([2, 2])
    seen = []
    tf.function(lambda t: seen.append(use_kernels(t)), jit_compile=True)(x)

    assert seen == [False]
    assert use_kernels(x)
    assert not use_kernels(tf.cast(x, tf.float64))
