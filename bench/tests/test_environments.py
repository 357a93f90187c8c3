import subprocess
import sys

import pytest

from bench import environments
from bench.environments import Environment, Peer, PeerError


@pytest.fixture
def calls(monkeypatch):
    """Record what would be run, and let it fail where a word says so."""
    made = []

    def run(command, **_):
        made.append(command[3:])
        failed = "no-such-thing" in command
        said = "WARNING: old\nERROR: No matching distribution\nmore" if failed else ""
        return subprocess.CompletedProcess(command, int(failed), "", said)

    def create(folder, **_):
        folder.mkdir(exist_ok=True)

    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments.venv, "create", create)
    return made


def test_steps_are_done_once_and_in_order(calls, tmp_path):
    environment = Environment(Peer("P", "m", (("a==1",), ("b", "c")), without=("c",)), tmp_path)
    environment.make()
    assert [call[0] for call in calls] == ["install", "install", "install", "uninstall"]
    assert calls[1][-1] == "a==1"
    assert calls[2][-2:] == ["b", "c"]
    environment.make()
    assert len(calls) == 4


def test_another_version_is_installed_anew(calls, tmp_path):
    for version in ("a==1", "a==2", "a==2"):
        Environment(Peer("P", "m", ((version,),)), tmp_path).make()
    assert [call[-1] for call in calls] == ["pip", "a==1", "pip", "a==2"]


@pytest.mark.usefixtures("calls")
def test_what_can_not_be_had_is_one_line(tmp_path):
    with pytest.raises(PeerError) as caught:
        Environment(Peer("P", "m", (("no-such-thing",),)), tmp_path).make()
    assert str(caught.value) == (
        "pip install no-such-thing failed: ERROR: No matching distribution"
    )
    assert not (tmp_path / "bench-p" / "ready.txt").exists()


def test_the_interpreter_is_the_environment_s_own(tmp_path):
    python = Environment(Peer("P", "m"), tmp_path).python
    assert python.parent.parent == tmp_path / "bench-p"
    assert str(python) != sys.executable
