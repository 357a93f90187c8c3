import io
import json

from bench.protocol import one_line, serve


def talk(*requests):
    lines = io.StringIO("".join(json.dumps(request) + "\n" for request in requests))
    answers = io.StringIO()
    serve({"add": lambda a, b: a + b, "fail": lambda: 1 / 0}, lines, answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_each_line_gets_a_line():
    assert talk(
        {"call": "add", "with": {"a": 1, "b": 2}}, {"call": "add", "with": {"a": "x", "b": "y"}}
    ) == [
        {"value": 3},
        {"value": "xy"},
    ]


def test_an_error_is_an_answer_and_the_worker_goes_on():
    failed, fine = talk({"call": "fail"}, {"call": "add", "with": {"a": 1, "b": 1}})
    assert failed == {"error": "ZeroDivisionError: division by zero"}
    assert fine == {"value": 2}


def test_an_error_fits_on_a_line_of_the_page():
    assert one_line(ValueError("two\nlines")) == "ValueError: two lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 900))) == 200
