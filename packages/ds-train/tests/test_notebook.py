"""What notebooks lean on: experiments, measurements, environments, questions and exercises."""

import json
import sys
import time

import ipywidgets
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.figure import Figure

from ds_train.notebook import (
    Choice,
    Environment,
    Exercise,
    Question,
    Quiz,
    benchmark,
    explore,
    memory_profile,
    start,
    sweep,
    verify,
)
from ds_train.notebook import explore as explore_function


def question(answer=1):
    return Question("Which?", options=("one", "<two>"), answer=answer, why=("no: one", "yes: two"))


# ---------------------------------------------------------------- experiments


def test_an_experiment_leaves_what_was_asked_and_found(tmp_path):
    run = start("study", seed=3, config={"width": 8}, out=tmp_path, tracker="none")
    drawn = tf.random.normal([2]).numpy()
    run.log(error=tf.constant(0.5))
    run.log(7, loss=2.0)
    figure = Figure()
    assert run.figure("nothing", figure) is figure
    run.finish(sizes=np.arange(3), passed=np.bool_(True))
    assert run.folder.parent == tmp_path / "study"
    assert json.loads((run.folder / "config.json").read_text()) == {
        "name": "study",
        "seed": 3,
        "width": 8,
    }
    assert json.loads((run.folder / "results.json").read_text()) == {
        "error": 0.5,
        "sizes": [0, 1, 2],
        "passed": True,
    }
    assert (run.folder / "nothing.png").read_bytes().startswith(b"\x89PNG")
    assert Environment.read(run.folder / "environment.json") == run.environment
    again = start("study", seed=3, out=tmp_path, tracker="none")
    np.testing.assert_array_equal(tf.random.normal([2]), drawn)  # the seed decides
    assert again.folder != run.folder


def test_what_is_shown_is_escaped(tmp_path):
    run = start("study", config={"note": "<b>"}, out=tmp_path, tracker="none")
    assert "&lt;b&gt;" in run.as_html()


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="tracker is 'paper'; it must be one of none, auto, tensor"
    ):
        start("study", out=tmp_path, tracker="paper")


# ---------------------------------------------------------------- environment


def test_an_environment_knows_versions_and_differences(tmp_path):
    here = Environment.current()
    assert here.packages["tensorflow"] == tf.__version__
    assert here.python == ".".join(map(str, sys.version_info[:3]))
    path = tmp_path / "environment.json"
    here.save(path)
    values = json.loads(path.read_text())
    values["packages"]["keras"] = "1.0"
    values["processors"] += 1
    path.write_text(json.dumps(values))
    found = Environment.read(path).differences(here)
    assert found == [
        f"processors: {here.processors + 1} -> {here.processors}",
        f"keras: 1.0 -> {here.packages['keras']}",
    ]
    assert here.differences(here) == []


def test_requirements_pin_versions_and_folders():
    here = Environment.current()
    values = {"one": "1.2", "two": "0.1 @ /somewhere/two"}
    found = Environment(**{**vars(here), "packages": values}).requirements()
    assert found == "one==1.2\ntwo @ file:///somewhere/two\n"


def test_an_environment_is_made_again(tmp_path):
    here = Environment.current()
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "pyproject.toml").write_text(
        '[project]\nname = "small"\nversion = "1.5"\n'
        '[build-system]\nrequires = []\nbuild-backend = "small_build"\nbackend-path = ["."]\n'
    )
    # A build backend of a few lines: the test needs no index.
    (tmp_path / "small" / "small_build.py").write_text(
        "import zipfile\n"
        "def build_wheel(folder, *_):\n"
        "    name = 'small-1.5-py3-none-any.whl'\n"
        "    with zipfile.ZipFile(f'{folder}/{name}', 'w') as wheel:\n"
        "        wheel.writestr('small.py', '')\n"
        "        info = 'small-1.5.dist-info'\n"
        "        facts = 'Metadata-Version: 2.1\\nName: small\\nVersion: 1.5\\n'\n"
        "        wheel.writestr(f'{info}/METADATA', facts)\n"
        "        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\\nGenerator: small\\n"
        "Root-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "        wheel.writestr(f'{info}/RECORD', '')\n"
        "    return name\n"
    )
    wanted = {"small": f"1.5 @ {tmp_path / 'small'}"}
    python = Environment(**{**vars(here), "packages": wanted}).restore(tmp_path / "env")
    assert list((python.parents[1] / "lib").glob("python*/site-packages/small.py"))
    with pytest.raises(FileExistsError, match="is there; name a new folder"):
        here.restore(tmp_path / "env")


def test_another_python_is_refused(tmp_path):
    old = Environment(**{**vars(Environment.current()), "python": "2.7.18"})
    with pytest.raises(ValueError, match=r"the snapshot is of Python 2\.7\.18; this is 3"):
        old.restore(tmp_path / "env")


def test_a_file_of_something_else_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a snapshot of an environment"):
        Environment.read(path)


# ---------------------------------------------------------------- measuring


def test_a_benchmark_counts_its_calls_and_sets_the_first_apart(monkeypatch):
    clock, calls = [0.0], []

    def slow(x):
        calls.append(x)
        clock[0] += 10.0 if len(calls) == 1 else float(len(calls))

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    timing = benchmark(slow, "x", warmup=2, repeats=4)
    assert calls == ["x"] * 6
    assert timing.first == 10.0
    assert timing.seconds == (3.0, 4.0, 5.0, 6.0)
    assert (timing.low, timing.median, timing.high) == (3.75, 4.5, 5.25)
    assert "4.5e+03 ms (3.75e+03 to 5.25e+03), the first call 1e+04 ms" in str(timing)


@pytest.mark.parametrize("wrong", [{"warmup": 0}, {"repeats": 0}])
def test_no_call_is_no_benchmark(wrong):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        benchmark(lambda: None, **wrong)


def test_a_sweep_goes_in_rounds():
    calls = []
    found = sweep(lambda n: lambda: calls.append(n), {"experts": [1, 2]}, warmup=1, repeats=2)
    assert calls == [1, 1, 2, 2, 1, 2, 1, 2]  # warm-up and one call each, then rounds
    assert [row["experts"] for row in found.rows] == [1, 2]
    for row, timing in zip(found.rows, found.timings, strict=True):
        assert (row["median"], row["first"]) == (timing.median, timing.first)
    with pytest.raises(ValueError, match=r"names 2 things \(a, b\)"):
        sweep(lambda _: None, {"a": [], "b": []})


def test_memory_of_what_a_function_holds_is_seen():
    held = []

    def hold():
        held.append(np.ones(40 << 20, np.uint8))  # touched, so resident

    use = memory_profile(hold)
    assert use.peak >= use.before + (39 << 20)
    assert use.grown == use.peak - use.before
    assert max(use.bytes) == use.peak
    assert list(use.seconds) == sorted(use.seconds)


def test_a_failing_function_ends_the_watch():
    with pytest.raises(ZeroDivisionError):
        memory_profile(lambda: 1 / 0)


# ---------------------------------------------------------------- quiz


def test_each_answer_has_its_word_and_reason():
    quiz = Quiz(question())
    assert (quiz.answer(0, 0).right, quiz.answer(0, 0).feedback) == (False, "no: one")
    assert (quiz.answer(0, 1).right, quiz.answer(0, 1).feedback) == (True, "yes: two")
    with pytest.raises(IndexError):
        quiz.answer(0, 2)


def test_clicking_shows_the_feedback():
    widget = Quiz(question())._widget().children[0]
    _, choice, feedback = widget.children
    assert isinstance(choice, ipywidgets.RadioButtons)
    assert feedback.value == ""
    choice.value = 0
    assert feedback.value == "<b>Not quite.</b> no: one"
    choice.value = 1
    assert feedback.value == "<b>Right.</b> yes: two"


def test_without_a_kernel_answers_are_folded():
    shown = Quiz(question())._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in shown
    page = shown["text/html"]
    assert "&lt;two&gt;" in page
    assert page.index("<details>") < page.index("<b>Right.</b> yes: two")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answer": 2}, "answer is 2; it must be an index of the 2 options"),
        ({"why": ("one",)}, "why has 1 texts for 2 options"),
        ({"options": ("same", "same")}, "are the same"),
    ],
)
def test_a_question_that_does_not_fit_is_refused(changed, said):
    fields = {"options": ("one", "two"), "answer": 0, "why": ("yes", "no")} | changed
    with pytest.raises(ValueError, match=said):
        Question("Which?", **fields)


# ---------------------------------------------------------------- exercise


def check(candidate):
    assert candidate(2) == 4, "try it with 2"
    if candidate(3) != 6:
        raise AssertionError


def solution(x):
    """The worked answer."""
    return 2 * x


def unwritten(x):
    raise NotImplementedError


@pytest.fixture
def exercise():
    return Exercise("Write `double`.", check, solution, {"a square": lambda x: x * x})


@pytest.mark.parametrize(
    ("candidate", "status", "hint"),
    [
        (solution, "right", ""),
        (unwritten, "unwritten", ""),
        (lambda x: x, "wrong", "try it with 2"),
        (lambda x: x * x, "wrong", "a check failed"),
        (lambda x: x[0], "wrong", "TypeError: 'int' object is not subscriptable"),
    ],
)
def test_a_check_answers_and_raises_nothing(exercise, candidate, status, hint):
    found = exercise.check(candidate)
    assert found.status == status
    assert hint in found.hint
    word = {"right": "Right", "wrong": "Not yet", "unwritten": "Not written yet"}[status]
    assert word in found._repr_html_()


def test_the_solution_is_shown_folded(exercise, monkeypatch):
    shown = []
    monkeypatch.setattr("ds_train.notebook.exercise.display", shown.append)
    exercise.show_solution()
    assert "<details>" in shown[0].data
    assert "return 2 * x" in shown[0].data


def test_the_task_is_markdown(exercise):
    assert exercise._repr_mimebundle_()["text/markdown"] == "Write `double`."


# ---------------------------------------------------------------- explore


def test_controls_draw_again(monkeypatch):
    shown, drawn = [], []

    class Handle:
        def update(self, figure):
            shown.append(figure)

    def display(what, **_):
        shown.append(what)
        return Handle()

    monkeypatch.setattr(sys.modules[explore_function.__module__], "display", display)

    def draw(width, depth):
        drawn.append((width, depth))
        return f"{width} x {depth}"

    explore(draw, width=(1, 2), depth=Choice((3, 4), 4))
    controls, first = shown
    assert first == "1 x 4"
    controls.children[0].value = 2
    assert shown[-1] == "2 x 4"
    assert drawn == [(1, 4), (2, 4)]


def test_a_default_that_is_not_offered_is_refused():
    with pytest.raises(ValueError, match=r"default is 5; it must be one of \(1, 2\)"):
        Choice((1, 2), 5)


# ---------------------------------------------------------------- verify


def test_what_is_right_passes(exercise):
    assert verify({"quiz": Quiz(question()), "exercise": exercise, "other": 1}) == []


def test_what_is_wrong_with_exercises_is_named():
    lenient = Exercise("", lambda _: None, solution, {"a square": lambda x: x * x})
    broken = Exercise("", check, unwritten, {"a square": lambda x: x * x})
    alone = Exercise("", check, solution, {})
    assert verify({"lenient": lenient, "broken": broken, "alone": alone}) == [
        "lenient: the mistake 'a square' passes",
        "broken: its solution fails: unwritten",
        "alone: has no mistake that its check must see through",
    ]


def test_a_quiz_that_takes_the_wrong_option_is_named():
    class Lenient(Quiz):
        def answer(self, question, option):
            found = super().answer(question, option)
            return type(found)(True, found.feedback)

    assert verify({"quiz": Lenient(question())}) == [
        "quiz: question 1 takes options [0, 1] for right"
    ]
