"""What the machine is, as far as speed depends on it. Reads Linux's /proc."""

from __future__ import annotations

import os
import platform
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def machine() -> dict[str, str]:
    """Return the processor, how many there are, memory and system."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": processor(info),
        "processors": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": platform.system(),
    }


def processor(info: str) -> str:
    """Return the name in /proc/cpuinfo, and what matters here of what the processor can do."""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    flags = fields.get("flags", "").split()
    name = fields.get("model name", platform.machine())
    can = [flag for flag in FLAGS if flag in flags]
    return f"{name} ({', '.join(can)})" if can else name
