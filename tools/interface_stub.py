"""Write a package's public interface as a stub, and name what breaks between two stubs.

Everything is read from the sources, nothing is imported, so TensorFlow need not be installed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import griffe

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = "# The public interface of {name}, written by `nox -s interfaces -- --write`.\n"
COLOUR = re.compile("\x1b\\[[0-9;]*m")
MARKS = {
    griffe.ParameterKind.var_positional: "*",
    griffe.ParameterKind.var_keyword: "**",
}


class InterfaceError(Exception):
    """A package whose public names cannot be read."""


def render(module: str, source: Path) -> str:
    """Return the stub of the names in `module.__all__`.

    Args:
        module: import name, such as "ds_moe" or "ds_moe.figures".
        source: the folder that holds it.

    Raises:
        InterfaceError: `__all__` is missing, or holds a name that is not there.
    """
    place = source.joinpath(*module.split("."))
    if not (place / "__init__.py").exists() and not place.with_suffix(".py").exists():
        raise InterfaceError(f"{module} has no __init__.py")
    tree = griffe.load(module, search_paths=[source], resolve_aliases=True)
    if not tree.exports:
        message = f"{module} has no __all__: it states the public names"
        raise InterfaceError(message)
    blocks = []
    for name in sorted(map(str, tree.exports), key=str.lower):
        member = tree.members.get(name)
        if member is None:
            raise InterfaceError(f"{module}.__all__ holds {name!r}, which is not defined there")
        if isinstance(member, griffe.Alias) and _is_a_siblings(member.target_path, module):
            blocks.append(f"{name} = ...  # {member.target_path}\n")
            continue
        try:
            found = _resolved(member)
        except griffe.AliasResolutionError as error:
            raise InterfaceError(f"{module}.{name} is imported from nowhere: {error}") from error
        if isinstance(found, griffe.Module) and name in found.members:
            # `from ds_train.pretrain import pretrain`: griffe sees the file before the function.
            found = _resolved(found.members[name])
        blocks.append("\n".join(_lines(name, found)) + "\n")
    return HEADER.format(name=module.replace("_", "-")) + "\n".join(blocks)


def _is_a_siblings(path: str, module: str) -> bool:
    """Say whether a name is passed on from another package, whose own snapshot has it."""
    package = path.partition(".")[0]
    return package.startswith("ds_") and package != module.partition(".")[0]


def breaks(old: str, new: str) -> list[str]:
    """Return one line for each change from stub `old` to `new` that can break a caller."""
    found = griffe.find_breaking_changes(_load(old), _load(new))
    lines = []
    for change in found:
        text = COLOUR.sub("", change.explain(griffe.ExplanationStyle.ONE_LINE))
        lines.append(text.partition(": ")[2] or text)
    return [line.replace("interface.", "", 1) for line in lines]


def _resolved(member: griffe.Object | griffe.Alias) -> griffe.Object:
    """Follow an imported name to where it is defined."""
    return member.final_target if isinstance(member, griffe.Alias) else member


def _load(stub: str) -> griffe.Object:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "interface.py").write_text(stub, encoding="utf-8")
        return _resolved(griffe.load("interface", search_paths=[folder]))


def _lines(name: str, found: griffe.Object) -> Iterator[str]:
    if isinstance(found, griffe.Function):
        yield from _function(name, found)
    elif isinstance(found, griffe.Class):
        yield from _class(name, found)
    elif isinstance(found, griffe.Attribute):
        yield from _attribute(name, found)
    else:
        raise InterfaceError(f"{found.path} is a module: export the names in it instead")


def _class(name: str, found: griffe.Class) -> Iterator[str]:
    bases = ", ".join(str(base) for base in found.bases)
    yield f"class {name}({bases}):" if bases else f"class {name}:"
    body = []
    for key, member in found.all_members.items():
        target = _resolved(member)
        public = not key.startswith("_") or key in {"__init__", "__call__"}
        if not public or not target.canonical_path.startswith("ds_"):
            continue
        bare = isinstance(target, griffe.Attribute) and not target.annotation
        if bare and "instance-attribute" in target.labels:
            continue  # set inside a method: part of how, not of what
        body += [f"    {line}" for line in _lines(key, target)]
    yield from body or ["    ..."]


def _attribute(name: str, found: griffe.Attribute) -> Iterator[str]:
    annotation = f": {found.annotation}" if found.annotation else ""
    if "property" in found.labels:
        yield "@property"
        yield f"def {name}(self){annotation.replace(':', ' ->')}: ..."
    else:
        yield f"{name}{annotation} = ..." if found.value is not None else f"{name}{annotation}"


def _function(name: str, found: griffe.Function) -> Iterator[str]:
    for label in ("staticmethod", "classmethod"):
        if label in found.labels:
            yield f"@{label}"
    returns = f" -> {found.returns}" if found.returns else ""
    yield f"def {name}({_parameters(found.parameters)}){returns}: ..."


def _parameters(parameters: griffe.Parameters) -> str:
    written: list[str] = []
    kinds = griffe.ParameterKind
    seen_star = False
    for index, parameter in enumerate(parameters):
        before = parameters[index - 1].kind if index else None
        if before is kinds.positional_only and parameter.kind is not kinds.positional_only:
            written.append("/")
        if parameter.kind is kinds.keyword_only and not seen_star:
            written.append("*")
        seen_star |= parameter.kind in {kinds.keyword_only, kinds.var_positional}
        text = MARKS.get(parameter.kind, "") + parameter.name
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and parameter.kind not in MARKS:
            text += f" = {parameter.default}" if parameter.annotation else f"={parameter.default}"
        written.append(text)
    return ", ".join(written)
