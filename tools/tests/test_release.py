"""A release leaves version, changelog, pins, tag and wheel right, or nothing changed."""

from __future__ import annotations

import zipfile

import pytest
from packaging.version import Version

import release
from workspace import git


def test_a_minor_release_moves_everything(repo, capsys):
    assert release.main(["ds-lower", "minor"], repo) == 0
    said = capsys.readouterr().out
    assert "released ds-lower 0.2.0: commit, tag ds-lower-v0.2.0" in said
    assert "moved its pin in ds-upper" in said
    assert git("status", "--porcelain", root=repo) == ""
    tagged = git("show", "ds-lower-v0.2.0:packages/ds-lower/pyproject.toml", root=repo)
    assert 'version = "0.2.0"' in tagged
    upper = git("show", "ds-lower-v0.2.0:packages/ds-upper/pyproject.toml", root=repo)
    assert '"ds-lower>=0.2,<0.3"' in upper
    assert 'version = "0.1.0"' in upper
    changelog = git("show", "HEAD:packages/ds-lower/CHANGELOG.md", root=repo)
    assert "## 0.2.0 (" in changelog
    assert "Unreleased" not in changelog
    assert "- Needs ds-lower >=0.2,<0.3.\n- A change." in git(
        "show", "HEAD:packages/ds-upper/CHANGELOG.md", root=repo
    )
    [wheel] = (repo / "dist").glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read("ds_lower-0.2.0.dist-info/METADATA").decode()
    assert "Version: 0.2.0" in metadata


def test_wheels_carry_ranges_and_no_paths(repo):
    assert release.main(["ds-upper", "patch"], repo) == 0
    [wheel] = (repo / "dist").glob("*.whl")
    metadata = zipfile.ZipFile(wheel).read("ds_upper-0.1.1.dist-info/METADATA").decode()
    assert "Requires-Dist: ds-lower (>=0.1,<0.2)" in metadata
    assert "file:" not in metadata


def test_a_patch_release_leaves_pins_alone(repo):
    assert release.main(["ds-lower", "patch"], repo) == 0
    assert "ds-lower>=0.1,<0.2" in git("show", "HEAD:packages/ds-upper/pyproject.toml", root=repo)


def test_the_lock_follows(repo):
    (repo / "poetry.lock").write_text(
        '[[package]]\nname = "ds-lower"\nversion = "0.1.0"\n\n'
        '[[package]]\nname = "ds-upper"\nversion = "0.1.0"\n\n'
        '[package.dependencies]\nds-lower = ">=0.1,<0.2"\n\n[metadata]\nlock-version = "2.1"\n'
    )
    git("add", ".", root=repo)
    git("commit", "--quiet", "--message", "A lock", root=repo)
    assert release.main(["ds-lower", "minor"], repo) == 0
    lock = git("show", "HEAD:poetry.lock", root=repo)
    assert 'name = "ds-lower"\nversion = "0.2.0"' in lock
    assert 'name = "ds-upper"\nversion = "0.1.0"' in lock
    assert 'ds-lower = ">=0.2,<0.3"' in lock


def test_a_dirty_tree_is_refused(repo, lower, capsys):
    lower.write_text(lower.read_text() + "\n")
    assert release.main(["ds-lower", "minor"], repo) == 2
    assert "commit them first" in capsys.readouterr().err
    assert git("tag", root=repo) == "ds-lower-v0.1.0"


def test_a_patch_that_breaks_is_refused(repo, lower, capsys):
    lower.write_text(lower.read_text().replace("times: int = 1", "count: int = 1"))
    git("commit", "--quiet", "--all", "--message", "A break", root=repo)
    assert release.main(["ds-lower", "patch"], repo) == 2
    assert "breaks ds-lower-v0.1.0: double(times)" in capsys.readouterr().err


def test_the_version_that_stands_can_be_released_once(repo, capsys):
    assert release.main(["ds-upper", "current"], repo) == 0
    assert git("tag", "--list", "ds-upper*", root=repo) == "ds-upper-v0.1.0"
    assert release.main(["ds-upper", "current"], repo) == 2
    assert "0.1.0 is already released" in capsys.readouterr().err


def test_without_a_word_in_the_changelog_nothing_happens(repo, capsys):
    changelog = repo / "packages/ds-lower/CHANGELOG.md"
    changelog.write_text("# Changelog of ds-lower\n\n## Unreleased\n\n## 0.1.0\n\n- First.\n")
    git("commit", "--quiet", "--all", "--message", "Nothing to say", root=repo)
    before = git("rev-parse", "HEAD", root=repo)
    assert release.main(["ds-lower", "minor"], repo) == 2
    assert "say under" in capsys.readouterr().err
    assert git("rev-parse", "HEAD", root=repo) == before
    assert git("status", "--porcelain", root=repo) == ""


def test_a_wheel_that_does_not_build_leaves_the_tree_as_it_was(repo, capsys):
    project = repo / "packages/ds-lower/pyproject.toml"
    project.write_text(project.read_text().replace('"ds_lower"', '"ds_nowhere"'))
    git("commit", "--quiet", "--all", "--message", "A broken build", root=repo)
    assert release.main(["ds-lower", "minor"], repo) == 2
    assert "release: " in capsys.readouterr().err
    assert git("status", "--porcelain", root=repo) == ""
    assert git("tag", root=repo) == "ds-lower-v0.1.0"


@pytest.mark.parametrize(
    ("version", "part", "following"),
    [
        ("0.1.4", "patch", "0.1.5"),
        ("0.1.4", "minor", "0.2.0"),
        ("0.9.0", "major", "1.0.0"),
        ("1.2.3", "current", "1.2.3"),
    ],
)
def test_next_version(version, part, following):
    assert release.next_version(Version(version), part) == Version(following)


@pytest.mark.parametrize(
    ("version", "range_"),
    [("0.2.0", ">=0.2,<0.3"), ("1.2.0", ">=1.2,<2"), ("0.10.0", ">=0.10,<0.11")],
)
def test_admitting_range(version, range_):
    assert release.admitting_range(Version(version)) == range_
