"""The command line: a saved model served and talked to, and one clear line on bad input."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import openai
import pytest
from typer.testing import CliRunner

from conftest import PROMPT, LiveServer, as_document
from ds_serve.cli import app


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "little"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(model, base_tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(path)
    base_tokenizer.save_pretrained(path)
    return path


def run(*arguments, stdin=""):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def test_chat_over_a_pipe_says_what_the_model_writes(saved, tokenizer, greedy):
    result = run("chat", saved, "--temperature", 0, "--max-tokens", 12, stdin=f"{PROMPT}\n")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    assert result.exit_code == 0
    assert result.stdout == tokenizer.decode(greedy(prompt, 12)) + "\n"


def test_chat_with_a_base_model_points_to_raw(base, base_tokenizer, greedy):
    result = run("chat", base, stdin=f"{PROMPT}\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "it is a base model, which continues text. Use --raw" in result.stderr
    options = ("--raw", "--json", "--temperature", 0, "--max-tokens", 5)
    answer = json.loads(run("chat", base, *options, stdin=f"{PROMPT}\n").stdout)
    assert answer["text"] == base_tokenizer.decode(greedy(as_document(base_tokenizer, PROMPT), 5))


def test_serve_tells_its_url_and_answers(saved, monkeypatch):
    made = SimpleQueue()

    class Observed(LiveServer):
        def __init__(self, config):
            super().__init__(config)
            made.put(self)

    def ask():
        server = made.get(timeout=60)
        try:
            assert server.up.wait(30)
            with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as api:
                messages = [{"role": "user", "content": PROMPT}]
                return server.url, api.chat.completions.create(model="little", messages=messages)
        finally:
            server.should_exit = True

    monkeypatch.setattr("uvicorn.Server", Observed)
    # Configuring logging closes absl's handler, and with it the stderr that pytest captures.
    monkeypatch.setattr("logging.config.dictConfig", lambda _: None)
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(ask)
        result = run("serve", saved, "--port", 0, "--json", "--max-new-tokens", 9)
        url, answer = asked.result(60)
    assert 1 <= answer.usage.completion_tokens <= 9
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert told == {"url": url, "model": "little", "chat": True, "cache_tokens": 32 * 128}


@pytest.mark.parametrize("command", ["serve", "chat"])
def test_a_wrong_directory_is_one_line_and_exit_code_2(command, saved, tmp_path):
    port = ("--port", 0) if command == "serve" else ()
    missing = run(command, tmp_path / "nothing", *port)
    assert (missing.exit_code, missing.stdout) == (2, "")
    assert missing.stderr.endswith(
        "is not a directory; give one with config.json and safetensors\n"
    )
    empty = run(command, tmp_path, *port)
    assert empty.exit_code == 2
    assert "tokenizer.json" in empty.stderr
    tokenizer_alone = tmp_path / "half"
    tokenizer_alone.mkdir()
    (tokenizer_alone / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
    half = run(command, tokenizer_alone, *port)
    assert half.exit_code == 2
    assert "config.json" in half.stderr
    for result in (missing, empty, half):
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("ds-serve: ")


def test_a_port_in_use_is_one_line(saved):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", saved, "--port", taken.getsockname()[1])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "can't listen at 127.0.0.1 port" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--top-p", 0), "--top-p is 0.0; it must be above 0"),
        (("--raw", "--system", "x"), "--system needs a conversation"),
        (("--temperature", 3), "temperature"),
        (("--max-tokens", 0), "max-tokens"),
    ],
    ids=str,
)
def test_bad_options_are_named(saved, options, words):
    result = run("chat", saved, *options)
    assert result.exit_code == 2
    assert words in result.stderr


def test_help_lists_both_commands():
    result = run("--help")
    assert result.exit_code == 0
    assert "serve" in result.stdout
    assert "chat" in result.stdout


def test_export_writes_a_saved_model(saved, tmp_path):
    result = run("export", saved, tmp_path / "out")
    assert result.exit_code == 0
    assert "signatures prefill and decode" in result.stdout
    assert (tmp_path / "out" / "saved_model.pb").exists()
    again = run("export", saved, tmp_path / "out")
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "has files in it" in again.stderr
    wrong = run("export", saved, tmp_path / "other", "--dtype", "float64")
    assert "--dtype is float64; it must be float32 or bfloat16" in wrong.stderr
    missing = run("export", tmp_path / "none", tmp_path / "other")
    assert "is not a directory" in missing.stderr


def test_capacity_plans_and_checks():
    planned = json.loads(run("capacity", "--json").stdout)
    assert planned["prefill_nodes"] % 4 == planned["decode_nodes"] % 18 == 0
    assert "nodes of 8" in run("capacity").stdout
    checked = json.loads(run("capacity", "--check", "--json").stdout)
    assert {entry["value"] for entry in checked} >= {73_700, 14_800}
    assert "fitted" in run("capacity", "--check").stdout
    assert "--device is X; known are" in run("capacity", "--device", "X").stderr
    impossible = run("capacity", "--speed", 1000)
    assert (impossible.exit_code, impossible.stderr.count("\n")) == (2, 1)


def test_keys_and_certificates_that_are_wrong_are_one_line(saved, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text("nothing")
    wrong = run("serve", saved, "--port", 0, "--api-keys", keys)
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "keys.toml" in wrong.stderr
    half = run("serve", saved, "--port", 0, "--tls-cert", keys)
    assert "--tls-cert and --tls-key belong together" in half.stderr
    small = run("serve", saved, "--port", 0, "--cache-tokens", 4)
    assert "cache_tokens is 4; a block has 32" in small.stderr
