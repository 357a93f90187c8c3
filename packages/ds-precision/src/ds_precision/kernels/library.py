"""Compiling `operations.cc` for this machine, once, and loading it.

The operations use TensorFlow's C interface, whose headers compile in no time and whose
binary form outlives a release.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType

import tensorflow as tf

SOURCE = Path(__file__).with_name("operations.cc")
SETTING = "DS_PRECISION_KERNELS"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fvisibility=hidden",
)

log = logging.getLogger("ds_precision")


@functools.cache
def kernels() -> ModuleType | None:
    """Return the module of compiled operations, or `None` where stock operations must do.

    Compiles on the first call on a machine (some seconds) and caches the result under
    `$XDG_CACHE_HOME/ds-precision`. Uses as many threads as TensorFlow's operations do.

    `DS_PRECISION_KERNELS` decides: "off" never; "auto", the default, on processors with AVX-512,
    for whose vectors they are written (without it a training step took 12 times as long as with
    stock operations); "on" everywhere but beside a GPU.

    Raises:
        ValueError: `DS_PRECISION_KERNELS` is set to something unknown.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in {"auto", "on", "off"}:
        raise ValueError(f"{SETTING} is {setting!r}; it must be 'auto', 'on' or 'off'")
    if setting == "off" or tf.config.list_physical_devices("GPU"):
        return None
    if setting == "auto" and "avx512f" not in _processor().split():
        log.info("this processor has no AVX-512: stock operations are faster, and run")
        return None
    try:
        path = compiled()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        log.warning("the fast operations can't be compiled, stock ones run: %s", said.strip())
        return None
    found = tf.load_op_library(str(path))
    ctypes.CDLL(str(path)).ds_set_threads(_threads())
    return found


def operations() -> ModuleType:
    """Return the compiled operations to code that has asked `use_kernels` before.

    Raises:
        RuntimeError: there are none here.
    """
    found = kernels()
    if found is None:
        raise RuntimeError("there are no compiled operations here; ask use_kernels first")
    return found


def compiled() -> Path:
    """Return the shared library, made now if this machine has none of this source yet."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler (c++, g++ or $CXX) is on the PATH")
    places = [f"-I{tf.sysconfig.get_include()}", *tf.sysconfig.get_link_flags()]
    command = [compiler, *FLAGS, str(SOURCE), *places]
    # A library for other instructions than this processor's would end the process.
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*"))]
    made_of = [*sources, compiler, *FLAGS, tf.__version__, _processor()]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds-precision"
    target = cache / f"operations-{digest}.so"
    if target.exists():
        return target
    log.info("compiling the fast operations into %s", target)
    cache.mkdir(parents=True, exist_ok=True)
    # Elsewhere first: another process may look for the file at this moment.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fresh = Path(folder) / target.name
        subprocess.run(  # noqa: S603 - the compiler is the user's own
            [*command, "-o", str(fresh)], check=True, capture_output=True, text=True
        )
        fresh.replace(target)
    return target


def _processor() -> str:
    """Return what tells apart processors that understand different instructions."""
    known = Path("/proc/cpuinfo")
    if not known.exists():
        return platform.processor()
    lines = known.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _threads() -> int:
    """Return as many as TensorFlow's own operations take, from the program or the environment."""
    said = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    asked = int(said) if said.isdecimal() else 0
    return tf.config.threading.get_intra_op_parallelism_threads() or asked or _processors()


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
