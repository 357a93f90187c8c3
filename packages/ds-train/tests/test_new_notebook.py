"""New notebooks run as they are; the commands around them say what is wrong."""

import json

import jupytext
import pytest
from typer.testing import CliRunner

from ds_train.cli import app
from ds_train.errors import TrainError
from ds_train.new_notebook import KINDS, new_notebook


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_runs_as_it_is(kind, tmp_path, monkeypatch):
    path = new_notebook(kind, f"my-{kind}", tmp_path / "deep" / "folder")
    monkeypatch.chdir(tmp_path)
    notebook = jupytext.read(path)
    assert notebook.metadata["ds"]["title"] == f"My {kind}"
    names = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, str(path), "exec"), names)  # noqa: S102 - our own cells
    (folder,) = (tmp_path / "experiments" / f"my-{kind}").iterdir()
    results = json.loads((folder / "results.json").read_text())
    if kind == "component":
        assert results["answer"] == {
            "equals the reference": True,
            "gradient equals finite differences": True,
        }
    else:
        assert results["refuted"] is False
        assert results["max_violation"]["0.02"] < results["max_violation"]["0.0"]
    assert list(folder.glob("*.png"))


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("poem", "x", "kind is 'poem'; it must be one of component, experiment"),
        ("component", "a/b", "name is 'a/b'; it must be letters, digits"),
    ],
)
def test_bad_words_are_named(tmp_path, kind, name, said):
    with pytest.raises(TrainError, match=said):
        new_notebook(kind, name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    path = new_notebook("component", "study", tmp_path)
    path.write_text("mine")
    ran = CliRunner().invoke(app, ["new-notebook", "component", "study", "--folder", str(tmp_path)])
    assert ran.exit_code == 2
    assert "is there already; choose another name" in ran.output
    assert path.read_text() == "mine"


def test_the_command_says_how_to_go_on(tmp_path):
    ran = CliRunner().invoke(app, ["new-notebook", "component", "study", "--folder", str(tmp_path)])
    assert ran.exit_code == 0
    assert "pip install 'ds-train[notebook]'" in ran.output


def test_an_environment_is_compared_and_a_wrong_file_named(tmp_path):
    from ds_train.notebook import Environment  # noqa: PLC0415 - an extra

    path = tmp_path / "environment.json"
    Environment.current().save(path)
    ran = CliRunner().invoke(app, ["restore-environment", str(path)])
    assert (ran.exit_code, ran.output.strip()) == (0, "nothing differs")
    path.write_text("[]")
    ran = CliRunner().invoke(app, ["restore-environment", str(path)])
    assert ran.exit_code == 2
    assert "not a snapshot of an environment" in ran.output
