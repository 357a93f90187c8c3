"""Exit codes, what goes to which stream, and answers for programs."""

import json

import pytest
from reference_cases import CASES
from reference_weights import write_checkpoint
from typer.testing import CliRunner

from ds_model.checkpoint.reader import SINGLE
from ds_model.cli import app
from ds_model.inspection import inspect

RELEASED = next(case for case in CASES if case.name == "released")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(RELEASED, tmp_path / "source")


def test_inspect_json_is_the_inspection(source):
    result = run("inspect", source, "--json")
    assert result.exit_code == 0
    answer, found = json.loads(result.stdout), inspect(source)
    assert answer["parameters"] == found.parameters._asdict()
    assert answer["cache_bytes_per_token"] == found.cache_bytes_per_token
    assert answer["problem"] is None


def test_inspect_table_holds_the_figures():
    result = run("inspect", "v3-671b")
    assert result.exit_code == 0
    for figure in ("671,026,404,352", "14,848", "36,625,603,584", "98.2% less"):
        assert figure in result.stdout


def test_convert_says_where_and_what_next(source, tmp_path):
    result = run("convert", source, tmp_path / "small", "--dtype", "bfloat16")
    assert result.exit_code == 0
    assert "ds-model inspect" in result.stdout
    stored = json.loads(run("inspect", tmp_path / "small", "--json").stdout)["dtypes"]
    assert set(stored) == {"BF16", "F32"}  # the router's bias stays


def test_convert_to_keras_and_back(source, tmp_path):
    result = run("convert", source, tmp_path / "model.keras", "--to", "keras", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["form"] == "keras"
    assert run("convert", tmp_path / "model.keras", tmp_path / "back").exit_code == 0
    assert (tmp_path / "back" / SINGLE).stat().st_size == (source / SINGLE).stat().st_size


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("inspect", "nonsense"), "nonsense"),
        (("inspect", "{tmp}"), "config.json"),
        (("convert", "{tmp}/nowhere", "{tmp}/target"), "nowhere"),
        (("convert", "{tmp}/source", "{tmp}/source"), "exists"),
        (("convert", "{tmp}/source", "{tmp}/target", "--to", "keras"), ".keras"),
        (("convert", "{tmp}/source", "{tmp}/source/config.json/x"), "config.json"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(tmp_path, arguments, named):
    result = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert named in result.stderr
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("arguments", [("convert",), ("inspect", "--nonsense"), ("nonsense",)])
def test_bad_usage_is_exit_code_2(arguments):
    assert run(*arguments).exit_code == 2


def test_a_broken_checkpoint_is_one_line(source, tmp_path):
    (source / SINGLE).write_bytes(b"\x00" * 100)
    result = run("convert", source, tmp_path / "target")
    assert result.exit_code == 2
    assert SINGLE in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
