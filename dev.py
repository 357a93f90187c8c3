"""Run any session of noxfile.py on a bare machine: `python3 dev.py quickstart`.

Needs Python 3.11 to 3.13 and nothing else. It keeps nox in .nox/nox, so no environment of yours is
touched. `python3 dev.py` shows the menu; what follows the session's name goes to nox as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".nox" / f"nox-{sys.version_info.major}.{sys.version_info.minor}"
BIN = HOME / ("Scripts" if os.name == "nt" else "bin")
NEEDS = ("nox[uv]>=2026.4", "packaging")  # as in the head of noxfile.py
READY = HOME / "ready.txt"


def bring_nox() -> None:
    """Make the environment that holds nox, once."""
    if READY.exists() and READY.read_text() == "\n".join(NEEDS):
        return
    print("Setting up nox in .nox (once) ...", flush=True)
    try:
        venv.create(HOME, clear=True, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit("This Python cannot make environments: install its venv package (python3-venv).")
    subprocess.run([BIN / "python", "-m", "pip", "install", "-q", *NEEDS], check=True)
    READY.write_text("\n".join(NEEDS))


def main(arguments: list[str]) -> int:
    """Bring nox, then run the session that the first argument names."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"Python is {found}; the packages need 3.11, 3.12 or 3.13: call dev.py with one.")
    bring_nox()
    command = [str(BIN / "python"), "-m", "nox", "--noxfile", str(ROOT / "noxfile.py")]
    command += ["--session", *arguments] if arguments else ["--list"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
