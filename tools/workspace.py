"""What the tools know of the workspace: its packages, their versions and who pins whom."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Package:
    """One folder under packages/, as its pyproject.toml describes it."""

    name: str
    folder: Path
    version: Version
    requirements: tuple[Requirement, ...]
    public: tuple[str, ...] = ()  # modules beside `__init__` whose `__all__` is public too

    @property
    def module(self) -> str:
        """The import name."""
        return self.name.replace("-", "_")

    @property
    def source(self) -> Path:
        """The folder that holds the import package."""
        return self.folder / "src"

    @property
    def snapshots(self) -> dict[str, Path]:
        """The committed snapshots of the public interface, by the module that each is of."""
        found = {self.module: self.folder / "interface.pyi"}
        return found | {
            f"{self.module}.{name}": self.folder / f"interface.{name}.pyi" for name in self.public
        }


def packages(root: Path = ROOT) -> dict[str, Package]:
    """Return the workspace's packages by name."""
    found = {}
    for path in sorted((root / "packages").glob("*/pyproject.toml")):
        file = tomllib.loads(path.read_text(encoding="utf-8"))
        project = file["project"]
        public = tuple(file.get("tool", {}).get("ds", {}).get("public", ()))
        requirements = tuple(map(Requirement, project["dependencies"]))
        version = Version(project["version"])
        name = project["name"]
        found[name] = Package(name, path.parent, version, requirements, public)
    return found


def pinned_by(name: str, root: Path = ROOT) -> dict[str, Requirement]:
    """Return the range on `name` of each package that depends on it."""
    return {
        package.name: requirement
        for package in packages(root).values()
        for requirement in package.requirements
        if requirement.name == name
    }


def git(*arguments: str, root: Path = ROOT) -> str:
    """Run git in the workspace and return what it prints.

    Raises:
        subprocess.CalledProcessError: git failed.
    """
    run = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def released_versions(name: str, root: Path = ROOT) -> list[Version]:
    """Return the versions that have a tag `NAME-vVERSION`, oldest first; [] outside git."""
    try:
        tags = git("tag", "--list", f"{name}-v*", root=root)
    except (subprocess.CalledProcessError, FileNotFoundError):
        return []
    return sorted(Version(tag.removeprefix(f"{name}-v")) for tag in tags.split())


def breaking_part(version: Version) -> tuple[int, ...]:
    """Return the part of a version whose growth announces a break: 0.N, or N from 1.0 on."""
    return (0, version.minor) if version.major == 0 else (version.major,)
