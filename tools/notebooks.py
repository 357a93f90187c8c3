"""Execute the notebooks: `python tools/notebooks.py run`, all of them or those that are named.

Sources are jupytext's percent files under docs/notebooks/. Executed ones, with their outputs, go to
build/notebooks/ and are never committed; the site is made of them. A notebook fails if a cell does,
if it takes twice the minutes in its header (once over is said, since machines have slow hours), or
if one of its quizzes or exercises is wrong: an option that earns the wrong word, a solution that
fails its check, a known mistake that passes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

from workspace import ROOT

SOURCES = ROOT / "docs" / "notebooks"
BUILT = ROOT / "build" / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"
VERIFY = """
import json as _json
from ds_train.notebook import verify as _verify
print(_json.dumps(_verify(globals())))
"""


class NotebookError(Exception):
    """A notebook that is not as it must be."""


@dataclass(frozen=True)
class Source:
    """One notebook's source.

    Attributes:
        path: The percent file.
        notebook: What it holds.
    """

    path: Path
    notebook: Any

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a percent file.

        Raises:
            NotebookError: Its header does not say what it must.
        """
        found = cls(path, jupytext.read(path))
        facts = found.notebook.metadata.get("ds", {})
        for key, kind in (("title", str), ("minutes", int | float), ("reading", int | float)):
            if not isinstance(facts.get(key), kind):
                raise NotebookError(f"{path}: its header must give `ds: {key}`")
        return found

    @property
    def title(self) -> str:
        """What it is called."""
        return str(self.notebook.metadata["ds"]["title"])

    @property
    def minutes(self) -> float:
        """What executing it may take, on two cores."""
        return float(self.notebook.metadata["ds"]["minutes"])

    @property
    def built(self) -> Path:
        """Where the executed notebook goes."""
        return BUILT / self.path.relative_to(SOURCES).with_suffix(".ipynb")

    @property
    def digest(self) -> str:
        """Of the source."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def is_fresh(self) -> bool:
        """Say whether this very source was executed; the packages may have changed since."""
        if not self.built.exists():
            return False
        return executed_facts(self.built).get("source") == self.digest


def executed_facts(built: Path) -> dict[str, Any]:
    """Return what was noted when a notebook was executed: `source`, `seconds`."""
    return json.loads(built.read_text(encoding="utf-8"))["metadata"].get("executed", {})


def sources() -> list[Source]:
    """Return all notebooks, in the order of their paths."""
    return [Source.read(path) for path in sorted(SOURCES.glob("*/*.py"))]


def execute(source: Source, *, limit: bool = True) -> float:
    """Execute a notebook, try its quizzes and exercises, and write it with its outputs.

    Args:
        source: Which.
        limit: Whether twice the minutes in its header bound it.

    Returns:
        Seconds that it took.

    Raises:
        NotebookError: It fails; says where and why.
    """
    notebook = nbformat.from_dict(source.notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(VERIFY))
    for cell in notebook.cells:
        cell.setdefault("id", nbformat.v4.new_code_cell().id)
    folder = source.built.parent / source.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook,
        timeout=int(60 * source.minutes * (2 if limit else 20)),
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    begin = time.perf_counter()
    try:
        client.execute()
    except CellTimeoutError as error:
        said = f"a cell took more than twice its {source.minutes} minutes"
        raise NotebookError(f"{source.path}: {said}") from error
    except CellExecutionError as error:
        raise NotebookError(f"{source.path}:\n{error}") from error
    seconds = time.perf_counter() - begin
    checks = notebook.cells.pop()
    wrong = json.loads("".join(o.get("text", "") for o in checks.outputs if o.name == "stdout"))
    if wrong:
        raise NotebookError("\n".join(f"{source.path}: {line}" for line in wrong))
    if limit and seconds > 2 * 60 * source.minutes:
        raise NotebookError(
            f"{source.path}: took {seconds / 60:.1f} minutes; its header says {source.minutes}"
        )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell ran is of no use
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if _is_kept(output)]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["executed"] = {"source": source.digest, "seconds": round(seconds, 1)}
    part = source.built.with_suffix(".part")
    nbformat.write(notebook, part)
    part.replace(source.built)
    return seconds


def _is_kept(output: Any) -> bool:
    """Say whether an output is for readers; takes live widgets away from what stands for them."""
    if output.output_type == "stream":
        return bool(output.name == "stdout")  # libraries' remarks go the other way
    data = output.get("data", {})
    if data.pop(WIDGET, None) is None:
        return True
    return bool(data.keys() - {"text/plain"})


def run(chosen: Sequence[Source], *, force: bool, limit: bool) -> int:
    """Execute notebooks and say how each went; return the exit code."""
    failed = []
    for number, source in enumerate(chosen, 1):
        where = source.path.relative_to(ROOT)
        if source.is_fresh() and not force:
            print(f"[{number}/{len(chosen)}] {where}: executed before", flush=True)
            continue
        print(f"[{number}/{len(chosen)}] {where} ...", end=" ", flush=True)
        try:
            seconds = execute(source, limit=limit)
        except NotebookError as error:
            failed.append(source)
            print(f"FAILED\n{error}", flush=True)
        else:
            over = ": OVER" if seconds > 60 * source.minutes else ""
            print(f"{seconds:.0f} s (stated {60 * source.minutes:.0f}){over}", flush=True)
    if failed:
        print(f"{len(failed)} of {len(chosen)} notebooks failed", flush=True)
    return int(bool(failed))


def main(arguments: list[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="execute notebooks whose source has changed")
    runs.add_argument("paths", nargs="*", type=Path, help="sources; all where none is named")
    runs.add_argument("--force", action="store_true", help="also those that were executed before")
    runs.add_argument("--no-limit", action="store_true", help="whatever their headers say")
    commands.add_parser("list", help="say what there is")
    asked = parser.parse_args(arguments)
    if asked.command == "list":
        for source in sources():
            state = "executed" if source.is_fresh() else "not executed"
            print(f"{source.path.relative_to(ROOT)}  {source.title}  ({state})")
        return 0
    # TensorFlow's remarks on the machine have no place among outputs.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        chosen = [Source.read(path.resolve()) for path in asked.paths] or sources()
    except (OSError, NotebookError) as error:
        parser.error(str(error))
    return run(chosen, force=asked.force, limit=not asked.no_limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
