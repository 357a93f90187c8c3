"""Hold public docstrings to what they promise: `python tools/docstrings.py`.

Each public name, and each public method and property of a class, has a docstring. One that takes
or gives tensors gives their shapes, as `[batch, sequence]` in backticks. And a name whose meaning
comes from elsewhere says where: its own docstring or its module's names the paper, section,
equation, file format or program; a module whose names are this project's own stands in `OWN`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

from interface_stub import _resolved
from workspace import ROOT, packages

TENSORS = re.compile(
    r"\b(tf\.Tensor|np\.ndarray|LatentCache|BlockScaled|QuantizedWeights|Routing)\b"
)
SHAPE = re.compile(r"`[^`]*\[[^\]`]*\][^`]*`|scalar|[Aa]ny shape|[Oo]f any shapes|shape of")
SOURCE = re.compile(
    r"arXiv|section|eq\.|https?://|config\.json|OpenAI|safetensors|Hugging Face|transformers|"
    r"compressed-tensors|llama\.cpp|Keras|torch|TensorBoard|MLflow|IEEE|DeepSeek|V3\b|kernel\.py"
)
OWN = {  # modules whose public names are this project's own ideas, with no source but themselves
    "ds_attention.figures",
    "ds_attention.mask",
    "ds_model.errors",
    "ds_model.generate",
    "ds_moe.figures",
    "ds_precision.choice",
    "ds_precision.figures",
    "ds_serve.api.keys",
    "ds_serve.api.limits",
    "ds_serve.engine.text",
    "ds_train.callbacks",
    "ds_train.errors",
    "ds_train.figures",
    "ds_train.memory",
    "ds_train.notebook",
    "ds_train.parallel.collectives",
    "ds_train.parallel.layout",
    "ds_train.parallel.world",
    "ds_train.pretrain",
    "ds_train.stability",
    "ds_train.trainer",
}


def problems(module: str, source: Path) -> Iterator[str]:
    """Say what is missing from a public module's docstrings, one line each."""
    tree = griffe.load(module, search_paths=[source], resolve_aliases=True)
    for name in sorted(map(str, tree.exports or ())):
        member = tree.members[name]
        if isinstance(member, griffe.Alias) and not member.target_path.startswith(
            module.partition(".")[0]
        ):
            continue  # a sibling's: looked at there
        found = _resolved(member)
        if isinstance(found, griffe.Module) and name in found.members:
            found = _resolved(found.members[name])
        yield from _of_name(f"{module}.{name}", found)


def _of_name(path: str, found: griffe.Object) -> Iterator[str]:
    text = _text(found)
    if not text:
        yield f"{path}: has no docstring"
        return
    home = found.module
    own = any(home.path == each or home.path.startswith(f"{each}.") for each in OWN)
    if not own and not SOURCE.search(text + _text(home)):
        yield f"{path}: neither it nor {home.path} names a source"
    if isinstance(found, griffe.Function):
        yield from _shapes(path, found, text)
    if isinstance(found, griffe.Class):
        for key, member in found.members.items():
            target = _resolved(member)
            if key.startswith("_") or not isinstance(target, griffe.Function | griffe.Attribute):
                continue
            said = _text(target)
            is_property = "property" in target.labels
            if isinstance(target, griffe.Attribute) and not is_property:
                continue  # described by the class
            if not said:
                yield f"{path}.{key}: has no docstring"
            elif isinstance(target, griffe.Function):
                yield from _shapes(f"{path}.{key}", target, f"{text}\n{said}")


def _shapes(path: str, found: griffe.Function, text: str) -> Iterator[str]:
    signature = [str(p.annotation) for p in found.parameters] + [str(found.returns)]
    if any(map(TENSORS.search, signature)) and not SHAPE.search(text):
        yield f"{path}: takes or gives tensors and tells no shape"


def _text(found: griffe.Object | griffe.Module) -> str:
    return found.docstring.value if found.docstring else ""


def main(root: Path = ROOT) -> int:
    """Look at every package; return the exit code."""
    found = [
        line
        for package in packages(root).values()
        for module in package.snapshots
        for line in problems(module, package.source)
    ]
    print("\n".join(found) or "docstrings: each public name says shapes and source")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
