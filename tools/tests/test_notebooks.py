"""The runner executes, holds to the stated minutes, and tries quizzes and exercises."""

from __future__ import annotations

import json

import pytest

import notebooks


def test_outputs_are_kept_and_a_second_run_has_nothing_to_do(write_notebook, capsys):
    source = write_notebook("import sys\nprint('hello'); print('a remark', file=sys.stderr)\n3 + 4")
    assert not source.is_fresh()
    assert notebooks.run([source], force=False, limit=True) == 0
    built = json.loads(source.built.read_text())
    (cell,) = [cell for cell in built["cells"] if cell["cell_type"] == "code"]
    stdout, result = cell["outputs"]
    assert "".join(stdout["text"]) == "hello\n"
    assert "".join(result["data"]["text/plain"]) == "7"
    assert built["metadata"]["executed"]["source"] == source.digest
    assert source.is_fresh()
    assert notebooks.run([source], force=False, limit=True) == 0
    assert "executed before" in capsys.readouterr().out
    assert not write_notebook("4").is_fresh()


@pytest.mark.parametrize(
    ("code", "minutes", "said"),
    [
        ("1 / 0", 1, "ZeroDivisionError"),
        ("wrong = ['quiz: question 1 takes options [0] for right']", 1, "quiz: question 1"),
        ("while True: pass", 0.05, "a cell took more than twice its 0.05 minutes"),
    ],
)
def test_what_is_wrong_fails_and_leaves_nothing(write_notebook, capsys, code, minutes, said):
    source = write_notebook(code, minutes)
    assert notebooks.run([source], force=False, limit=True) == 1
    assert said in capsys.readouterr().out
    assert not source.built.exists()


def test_a_widget_leaves_what_stands_for_it(write_notebook):
    code = (
        "from IPython.display import display\n"
        f"W = '{notebooks.WIDGET}'\n"
        "display({W: {}, 'text/plain': 'HBox()'}, raw=True)\n"
        "display({W: {}, 'text/html': '<b>quiz</b>', 'text/plain': 'a quiz'}, raw=True)"
    )
    source = write_notebook(code)
    notebooks.execute(source)
    built = json.loads(source.built.read_text())
    (output,) = built["cells"][-1]["outputs"]
    assert set(output["data"]) == {"text/html", "text/plain"}


def test_a_header_that_says_too_little_is_named(tmp_path):
    path = tmp_path / "bare.py"
    path.write_text("# %%\n1\n")
    with pytest.raises(notebooks.NotebookError, match="its header must give `ds: title`"):
        notebooks.Source.read(path)


def test_the_command_names_a_missing_file(capsys):
    with pytest.raises(SystemExit):
        notebooks.main(["run", "nowhere.py"])
    assert "nowhere.py" in capsys.readouterr().err


MASTERCLASS = sorted((notebooks.SOURCES / "masterclass").glob("*.py"))


def test_the_course_has_six_parts_of_four_hours():
    parts = [notebooks.Source.read(path) for path in MASTERCLASS]
    assert len(parts) == 6
    assert sum(part.notebook.metadata["ds"]["reading"] for part in parts) == 240
    assert sum(part.minutes for part in parts) <= 10


@pytest.mark.parametrize("path", MASTERCLASS, ids=lambda path: path.stem)
def test_each_part_has_what_a_part_has(path):
    text = path.read_text(encoding="utf-8")
    headings = ("What you will be able to do", "Quiz", "Exercise", "What goes wrong", "Checkpoint")
    missing = [each for each in headings if f"# ## {each}" not in text]
    calls = ("explore(", "Quiz(", "Exercise(", ".check(", ".show_solution()", "assert")
    missing += [each for each in calls if each not in text]
    assert missing == []


@pytest.fixture
def progress(monkeypatch, tmp_path):
    """Return the module with reports of its own."""
    import progress as module  # noqa: PLC0415 - patched

    monkeypatch.setattr(module, "REPORTS", tmp_path)
    (tmp_path / "tests-ds-moe.xml").write_text(
        '<testsuites><testsuite time="2.5">'
        '<testcase classname="tests.test_router" name="test_a[1]"/>'
        '<testcase classname="tests.test_router" name="test_b"><failure/></testcase>'
        '<testcase classname="tests.test_gpu" name="test_c"><skipped message="no GPU"/></testcase>'
        "</testsuite></testsuites>"
    )
    return module


@pytest.mark.parametrize(
    ("tests", "state"),
    [
        (["tests(ds-moe)::test_router::test_a"], "holds: 1 tests"),
        (["tests(ds-moe)::test_router"], "**fails**"),
        (["tests(ds-moe)::test_gone"], "**fails**"),  # a promise whose test is no more
        (["tests(ds-moe)::test_gpu"], "not run in this build"),
        (["parity::test_forward"], "not run in this build"),
        (["tests(ds-moe)::test_router::test_a", "parity"], "not run in this build"),
    ],
)
def test_a_promise_is_judged_by_its_tests(progress, tests, state):
    assert progress.judged({"text": "", "tests": tests}, progress.reports())[0] == state


def test_what_has_no_test_is_not_there_yet(progress):
    assert progress.judged({"text": ""}, progress.reports())[0] == "not yet"


def test_the_page_tells_tests_and_why_some_were_skipped(progress):
    page = progress.progress_page()
    assert "| `tests-ds-moe` | 1 | 1 | 1: no GPU | 2 |" in page
    assert "of 13 |" in page  # rows of the benchmark


def test_every_promise_names_tests_that_exist(progress):
    """The names are looked for in the sources, since no report is at hand here."""
    promised = progress.tomllib.loads(progress.PROMISED.read_text())["phase"]
    missing = []
    for pattern in [t for p in promised for c in p["criteria"] for t in c.get("tests", ())]:
        session, module, beginning = (*pattern.split("::"), "", "")[:3]
        root = notebooks.ROOT
        package = session.partition("(")[2].rstrip(")")
        folders = {"tools": root / "tools/tests", "parity": root / "parity"}
        folder = root / "packages" / package / "tests" if package else folders[session]
        file = folder / f"{module}.py" if module else folder
        if not file.exists() or (module and f"def {beginning}" not in file.read_text()):
            missing.append(pattern)
    assert missing == []
