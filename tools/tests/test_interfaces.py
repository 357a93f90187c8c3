"""The interface check fails on what breaks a caller, and says what and whom."""

from __future__ import annotations

import pytest

import interfaces
import release
from workspace import git


def test_the_recorded_interface_passes(repo, capsys):
    assert interfaces.main([], repo) == 0
    assert "as recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("def double", "def twice", "double: Public object was removed"),
        ("times: int = 1", "count: int = 1", "double(times): Parameter was removed"),
        ("times: int = 1", "times: int", "double(times): Parameter is now required"),
        ("times: int = 1", "times: int = 2", "double(times): Parameter default was changed"),
    ],
)
def test_a_break_names_what_broke_and_who_pins_it(repo, lower, capsys, old, new, named):
    code = lower.read_text().replace(old, new)
    lower.write_text(code.replace('"double"', '"twice"') if "twice" in new else code)
    assert interfaces.main([], repo) == 1
    said = capsys.readouterr().out
    assert f"ds-lower 0.1.0 breaks ds-lower-v0.1.0: {named}" in said
    assert "pinned by ds-upper (ds-lower<0.2,>=0.1)" in said
    assert "nox -s release -- ds-lower minor --prepare" in said


def test_a_break_of_a_released_package_cannot_be_refreshed_away(repo, lower):
    lower.write_text(lower.read_text().replace("times: int = 1", "count: int = 1"))
    assert interfaces.main(["--write"], repo) == 1
    assert interfaces.main([], repo) == 1


def test_a_break_with_a_new_minor_version_is_recorded(repo, lower, capsys):
    lower.write_text(lower.read_text().replace("times: int = 1", "count: int = 1"))
    assert release.main(["ds-lower", "minor", "--prepare"], repo) == 0
    assert interfaces.main([], repo) == 1
    assert "nox -s interfaces -- --write" in capsys.readouterr().out
    assert interfaces.main(["--write"], repo) == 0
    assert interfaces.main([], repo) == 0


def test_an_addition_fails_until_it_is_recorded(repo, lower, capsys):
    lower.write_text(lower.read_text().replace("times: int = 1", "times: int = 1, base: int = 2"))
    assert interfaces.main([], repo) == 1
    said = capsys.readouterr().out
    assert "+ def double(value: int, times: int = 1, base: int = 2) -> int: ..." in said
    assert interfaces.main(["--write"], repo) == 0
    assert interfaces.main([], repo) == 0


def test_before_the_first_release_a_break_fails_until_it_is_recorded(repo, upper, capsys):
    upper.write_text(upper.read_text().replace("value: int", "number: int"))
    assert interfaces.main([], repo) == 1
    assert "quadruple(value): Parameter was removed" in capsys.readouterr().out
    assert interfaces.main(["--write"], repo) == 0
    assert interfaces.main([], repo) == 0


def test_a_public_name_that_is_not_there_is_named(repo, lower, capsys):
    lower.write_text(lower.read_text().replace('["double"]', '["double", "halve"]'))
    assert interfaces.main([], repo) == 1
    assert "ds_lower.__all__ holds 'halve', which is not defined there" in capsys.readouterr().out


def test_an_unknown_package_is_refused(repo, capsys):
    with pytest.raises(SystemExit):
        interfaces.main(["ds-nothing"], repo)
    assert "there are ds-lower, ds-upper" in capsys.readouterr().err


def test_the_check_is_of_the_tree_not_of_git(repo):
    git("rm", "-r", "--cached", "--quiet", "packages", root=repo)
    assert interfaces.main([], repo) == 0
