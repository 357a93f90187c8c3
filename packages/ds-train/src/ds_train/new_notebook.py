"""New notebooks from templates that run as they are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ds_train.errors import TrainError

KINDS = ("component", "experiment")


def new_notebook(kind: str, name: str, folder: Path) -> Path:
    """Write a notebook's source, a percent file that Jupyter opens through jupytext.

    Args:
        kind: "component" or "experiment".
        name: Of the file, and of the experiment.
        folder: Where it goes; made if it is not there.

    Raises:
        TrainError: The kind is unknown, the name is no file name, or the file is there.
    """
    if kind not in KINDS:
        raise TrainError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if not name.replace("-", "_").isidentifier():
        raise TrainError(f"name is {name!r}; it must be letters, digits, - and _, as in mla-study")
    path = folder / f"{name}.py"
    if path.exists():
        raise TrainError(f"{path}: is there already; choose another name")
    template = resources.files("ds_train") / "templates" / f"{kind}.py.tmpl"
    title = name.replace("-", " ").replace("_", " ").capitalize()
    text = template.read_text(encoding="utf-8").format(name=name, title=title)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
