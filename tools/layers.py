"""Hold the packages to their order, and to each other's public names.

The order itself is import-linter's contract in pyproject.toml. Beyond it, a package may import from
a sibling only what that sibling's `__all__` holds: `from ds_moe import Router`, never
`from ds_moe.router import Router`.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from importlinter.cli import lint_imports

from workspace import ROOT, packages


def public_names(module: Path) -> frozenset[str]:
    """Return what a module's `__all__` holds, read without importing it."""
    files = [module / "__init__.py", module.with_suffix(".py")]
    file = next((each for each in files if each.exists()), None)
    if file is None:
        return frozenset()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def private_imports(file: Path, module: str, public: dict[str, frozenset[str]]) -> list[str]:
    """Return one line for each import in `file` that reaches past a sibling's public names.

    Args:
        file: a source file of the package `module`.
        module: the import name of the package that the file belongs to.
        public: the public names of every public module, by its path.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        reached: list[str] = []
        if isinstance(node, ast.Import):
            reached = [name.name for name in node.names if "." in name.name]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module in public:
                names = {name.name for name in node.names} - public[node.module]
                reached = [f"{node.module}.{name}" for name in sorted(names)]
            elif "." in node.module:
                reached = [node.module]
        for path in reached:
            sibling = path.partition(".")[0]
            if sibling in public and sibling != module:
                line = getattr(node, "lineno", 0)
                found.append(f"{file}:{line}: {path} is not public: see {sibling}.__all__")
    return found


def main(root: Path = ROOT) -> int:
    """Check the order and the names; return the exit code."""
    known = packages(root)
    public = {
        module: public_names(package.source.joinpath(*module.split(".")))
        for package in known.values()
        for module in package.snapshots
    }
    problems = [
        line
        for package in known.values()
        for file in sorted(package.source.rglob("*.py"))
        for line in private_imports(file, package.module, public)
    ]
    print("\n".join(problems) or "public names: no package reaches past a sibling's __all__")
    sys.path[:0] = [str(package.source) for package in known.values()]
    ordered = lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True)
    return int(bool(problems) or ordered != 0)


if __name__ == "__main__":
    sys.exit(main())
