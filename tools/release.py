"""Release one package: `nox -s release -- ds-moe minor`.

Moves its version, its changelog and the pins of the packages that depend on it, builds its wheel,
commits and tags `ds-moe-v0.2.0`. Nothing is pushed. If a step fails, the tree is as it was.

PART is major, minor or patch; `current` releases the version that stands in pyproject.toml (the
first release, or one that `--prepare` moved). `--prepare` moves version and pins only: what a
change that breaks callers carries with it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from interface_stub import InterfaceError
from interfaces import check
from workspace import ROOT, Package, git, packages, pinned_by, released_versions

PARTS = ("major", "minor", "patch", "current")


class ReleaseError(Exception):
    """A release that cannot be made, and what to do about it."""


def next_version(version: Version, part: str) -> Version:
    """Return the version after `version` when `part` grows."""
    major, minor, patch = version.release
    following = {
        "major": (major + 1, 0, 0),
        "minor": (major, minor + 1, 0),
        "patch": (major, minor, patch + 1),
        "current": (major, minor, patch),
    }
    return Version(".".join(map(str, following[part])))


def admitting_range(version: Version) -> str:
    """Return the range that siblings pin: up to the next version that may break."""
    major, minor, _ = version.release
    return f">=0.{minor},<0.{minor + 1}" if major == 0 else f">={major}.{minor},<{major + 1}"


def replace_once(path: Path, pattern: str, text: str) -> None:
    """Replace the one line that matches `pattern` in a file.

    Raises:
        ReleaseError: the file has no such line.
    """
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(pattern, lambda _: text, before, count=1, flags=re.MULTILINE)
    if not count:
        raise ReleaseError(f"{path}: found nothing like {pattern!r}")
    path.write_text(after, encoding="utf-8")


def move_version(package: Package, version: Version, root: Path) -> list[Path]:
    """Write a new version, and move the siblings' pins that do not admit it."""
    changed = [package.folder / "pyproject.toml"]
    replace_once(changed[0], r'^version = ".*"$', f'version = "{version}"')
    lock = root / "poetry.lock"
    if lock.exists():
        entry = rf'(?<=name = "{package.name}"\n)version = ".*"$'
        replace_once(lock, entry, f'version = "{version}"')
        changed.append(lock)
    known = packages(root)
    for name, requirement in pinned_by(package.name, root).items():
        if requirement.specifier.contains(version):
            continue
        path = known[name].folder / "pyproject.toml"
        range_ = admitting_range(version)
        replace_once(path, rf'"{package.name}[><=][^"]*"', f'"{package.name}{range_}"')
        note_change(known[name].folder / "CHANGELOG.md", f"Needs {package.name} {range_}.")
        changed += [path, known[name].folder / "CHANGELOG.md"]
        if lock.exists():
            move_locked_pin(lock, name, package.name, range_)
    return changed


def move_locked_pin(lock: Path, user: str, name: str, range_: str) -> None:
    """Write the moved pin on `name` into its user's entry of the lock."""
    text = lock.read_text(encoding="utf-8")
    start = text.index(f'name = "{user}"\n')
    end = text.find("[[package]]", start)
    pin = f'{name} = "{range_}"'
    entry = re.sub(rf'^{name} = ".*"$', pin, text[start:end], flags=re.MULTILINE)
    lock.write_text(text[:start] + entry + text[end:], encoding="utf-8")


def note_change(changelog: Path, line: str) -> None:
    """Add a line to what is unreleased."""
    text = changelog.read_text(encoding="utf-8")
    if "## Unreleased\n" not in text:
        head, _, rest = text.partition("\n## ")
        text = f"{head}\n## Unreleased\n" + (f"\n## {rest}" if rest else "")
    head, _, rest = text.partition("## Unreleased\n")
    entries = rest.lstrip("\n")
    gap = "" if entries.startswith("- ") or not entries else "\n"
    changelog.write_text(f"{head}## Unreleased\n\n- {line}\n{gap}{entries}", encoding="utf-8")


def close_changelog(changelog: Path, version: Version) -> None:
    """Give what is unreleased its version and its day.

    Raises:
        ReleaseError: nothing stands under "Unreleased".
    """
    text = changelog.read_text(encoding="utf-8")
    unreleased = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if not unreleased or not unreleased[1].strip():
        raise ReleaseError(f'{changelog}: say under "## Unreleased" what changed')
    today = dt.datetime.now(tz=dt.UTC).date()
    heading = f"## {version} ({today})\n"
    changelog.write_text(text.replace("## Unreleased\n", heading, 1), encoding="utf-8")


def refuse_unless_sound(package: Package, version: Version, part: str, root: Path) -> None:
    """Check what must hold before a release touches anything.

    Raises:
        ReleaseError: the tree is dirty, the version is not new, or an interface is broken.
    """
    dirty = git("status", "--porcelain", root=root)
    if dirty:
        raise ReleaseError(f"the tree has changes; commit them first:\n{dirty}")
    released = released_versions(package.name, root)
    if released and version <= released[-1]:
        raise ReleaseError(f"{package.name} {version}: {released[-1]} is already released")
    stale = check(package, root) if part in {"patch", "current"} else []
    if stale:
        raise ReleaseError("\n".join(stale))


def release(package: Package, version: Version, root: Path) -> str:
    """Release a package as `version`; return what was done, a line each."""
    tag = f"{package.name}-v{version}"
    start = git("rev-parse", "HEAD", root=root)
    try:
        changed = move_version(package, version, root)
        close_changelog(package.folder / "CHANGELOG.md", version)
        changed.append(package.folder / "CHANGELOG.md")
        record_interface(package.name, root)
        wheel = build_wheel(package, root)
        git("add", "--", *map(str, [*changed, *package.snapshots.values()]), root=root)
        git("commit", "--quiet", "--message", f"Release {package.name} {version}", root=root)
        git("tag", "--annotate", tag, "--message", f"{package.name} {version}", root=root)
    except (ReleaseError, InterfaceError, subprocess.CalledProcessError, OSError):
        git("reset", "--quiet", "--hard", start, root=root)
        raise
    moved = [path.parent.name for path in changed if path.name == "pyproject.toml"][1:]
    lines = [f"released {package.name} {version}: commit, tag {tag}, {wheel.relative_to(root)}"]
    lines += [f"moved its pin in {', '.join(moved)}"] if moved else []
    return "\n".join([*lines, f"to publish: git push origin main {tag}"])


def record_interface(name: str, root: Path) -> None:
    """Refresh the snapshot under the new version.

    Raises:
        ReleaseError: the new version does not announce what broke.
    """
    broken = check(packages(root)[name], root, write=True)
    if broken:
        raise ReleaseError("\n".join(broken))


def build_wheel(package: Package, root: Path) -> Path:
    """Build the package's wheel into dist/."""
    out = root / "dist"
    command = [sys.executable, "-m", "uv", "build", "--wheel", "--out-dir", str(out)]
    subprocess.run([*command, str(package.folder)], check=True, capture_output=True, text=True)
    version = packages(root)[package.name].version
    return next(out.glob(f"{package.module}-{version}-*.whl"))


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Release a package, or say in a line why not; return the exit code."""
    known = packages(root)
    parser = argparse.ArgumentParser(prog="release", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--prepare", action="store_true", help="move version and pins only")
    asked = parser.parse_args(arguments)
    package = known[asked.name]
    version = next_version(package.version, asked.part)
    try:
        if asked.prepare:
            changed = move_version(package, version, root)
            print("\n".join(f"changed {path.relative_to(root)}" for path in changed))
        else:
            refuse_unless_sound(package, version, asked.part, root)
            print(release(package, version, root))
    except (ReleaseError, InterfaceError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"release: {error.cmd[0]} failed: {error.stderr or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
