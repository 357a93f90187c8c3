"""The root lock says what the packages declare, so `poetry install` gives what nox gives."""

from __future__ import annotations

import tomllib

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from workspace import ROOT, packages

LOCKED = {
    entry["name"]: entry
    for entry in tomllib.loads((ROOT / "poetry.lock").read_text(encoding="utf-8"))["package"]
}
ADVICE = "poetry.lock is behind: run `poetry lock`"


@pytest.mark.parametrize("name", packages())
def test_the_lock_holds_what_a_package_declares(name):
    package = packages()[name]
    assert Version(LOCKED[name]["version"]) == package.version, ADVICE
    declared = {requirement.name: requirement.specifier for requirement in package.requirements}
    locked = {
        key: SpecifierSet(entry["version"])
        for key, value in LOCKED[name]["dependencies"].items()
        for entry in entries(value)
        if not entry.get("optional")  # an extra's
    }
    assert locked == declared, ADVICE
    for dependency, specifier in declared.items():
        assert specifier.contains(Version(LOCKED[dependency]["version"])), ADVICE


def entries(value: str | dict | list) -> list[dict]:
    """Return what the lock says of a dependency: a version, a table, or one for each extra."""
    found = value if isinstance(value, list) else [value]
    return [{"version": entry} if isinstance(entry, str) else entry for entry in found]


def test_the_lock_names_no_host_and_no_torch():
    assert "torch" not in LOCKED
    sources = {entry.get("source", {}).get("url", "") for entry in LOCKED.values()}
    assert sources == {""} | {f"packages/{name}" for name in packages()}
