"""Hold each package to its committed public interface: `nox -s interfaces`.

The snapshot packages/NAME/interface.pyi lists the public names with their signatures. A difference
fails, so that a change of the interface is seen in review. Against the last release, tagged
NAME-vVERSION, a change that can break a caller also needs a new version: until 1.0 a new minor one,
because siblings pin `>=0.N,<0.N+1`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from interface_stub import InterfaceError, breaks, render
from workspace import ROOT, Package, breaking_part, git, packages, pinned_by, released_versions


def check(package: Package, root: Path, *, write: bool = False) -> list[str]:
    """Return what is wrong with one package's interface, one line each.

    Args:
        package: the package to look at.
        root: the workspace.
        write: put the snapshot right instead of complaining that it differs.
    """
    found = []
    for module, snapshot in package.snapshots.items():
        found += _check_module(package, module, snapshot, root, write=write)
    return found


def _check_module(
    package: Package, module: str, snapshot: Path, root: Path, *, write: bool
) -> list[str]:
    current = render(module, package.source)
    problems = unannounced_breaks(package, snapshot, current, root)
    recorded = snapshot.read_text(encoding="utf-8") if snapshot.exists() else ""
    if current == recorded or problems:
        return problems
    where = snapshot.relative_to(root)
    broken = breaks(recorded, current)
    notes = [f"{package.name}: {line}" for line in broken]
    notes += pins(package, root) if broken else []
    if write:
        snapshot.write_text(current, encoding="utf-8")
        print("\n".join([*notes, f"{package.name}: wrote {where}"]))
        return []
    if not broken:
        notes = differences(package, recorded, current) if recorded else []
    advice = "if that is meant: nox -s interfaces -- --write"
    return [*notes, f"{package.name}: the sources differ from {where}; {advice}"]


def unannounced_breaks(package: Package, snapshot: Path, current: str, root: Path) -> list[str]:
    """Return the breaks since the last release that the version does not announce."""
    released = released_versions(package.name, root)
    if not released or breaking_part(package.version) > breaking_part(released[-1]):
        return []
    tag = f"{package.name}-v{released[-1]}"
    try:
        old = git("show", f"{tag}:packages/{package.name}/{snapshot.name}", root=root)
    except subprocess.CalledProcessError:
        if snapshot.name != "interface.pyi":
            return []  # the module has become public since
        return [f"{package.name}: {tag} has no interface.pyi to compare with"]
    broken = [
        f"{package.name} {package.version} breaks {tag}: {line}" for line in breaks(old, current)
    ]
    if not broken:
        return []
    advice = f"nox -s release -- {package.name} minor --prepare"
    return [
        *broken,
        *pins(package, root),
        f"{package.name}: bump its version and move the pins: {advice}",
    ]


def pins(package: Package, root: Path) -> list[str]:
    """Return a line that names the siblings which pin a package."""
    users = ", ".join(
        f"{name} ({range_})" for name, range_ in pinned_by(package.name, root).items()
    )
    return [f"{package.name} is pinned by {users}"] if users else []


def differences(package: Package, recorded: str, current: str) -> list[str]:
    """Return the lines that came and went, none of which breaks a caller."""
    old, new = recorded.splitlines(), current.splitlines()
    gone = [f"{package.name}: - {line.strip()}" for line in old if line not in new]
    return gone + [f"{package.name}: + {line.strip()}" for line in new if line not in old]


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Check or write the snapshots; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="packages; all where none is named")
    parser.add_argument("--write", action="store_true", help="refresh the snapshots")
    asked = parser.parse_args(arguments)
    known = packages(root)
    unknown = sorted(set(asked.names) - known.keys())
    if unknown:
        parser.error(f"no package {unknown[0]!r}: there are {', '.join(known)}")
    problems = []
    for name in asked.names or known:
        try:
            problems += check(known[name], root, write=asked.write)
        except InterfaceError as error:
            problems.append(f"{name}: {error}")
    print("\n".join(problems) or "interfaces: as recorded")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
