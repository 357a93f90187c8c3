"""The terminal chat, with text from a pipe."""

import io
import json

import numpy as np
import pytest

from conftest import PROMPT, as_document
from ds_serve.chat import Chat, talk
from ds_serve.writing import Options


@pytest.fixture
def say(monkeypatch, capsys):
    """Runs a talk over typed lines; returns whether it went well, and what was printed."""

    def run(chat, *lines, **options):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        ok = talk(chat, **options)
        printed = capsys.readouterr()
        return ok, printed.out, printed.err

    return run


def user(text):
    return {"role": "user", "content": text}


def test_answers_are_greedy_text_and_the_history_counts(model, tokenizer, greedy, say):
    first_turn = [user(PROMPT)]
    first = tokenizer.decode(greedy(tokenizer.apply_chat_template(first_turn), 10))
    turns = [*first_turn, {"role": "assistant", "content": first}, user("and")]
    second = tokenizer.decode(greedy(tokenizer.apply_chat_template(turns), 10))
    chat = Chat(model, tokenizer, Options(10))
    assert say(chat, PROMPT, "", "and") == (True, f"{first}\n{second}\n", "")


def test_reset_forgets_and_exit_ends(model, tokenizer, say):
    chat = Chat(model, tokenizer, Options(6), system="Be brief.")
    ok, out, err = say(chat, PROMPT, "/reset", PROMPT, "/exit", "never read")
    first, second = out.splitlines()
    assert (ok, first, err) == (True, second, "")
    assert chat.messages[:2] == [{"role": "system", "content": "Be brief."}, user(PROMPT)]


def test_json_is_one_object_a_reply(model, tokenizer, greedy, say):
    prompt = tokenizer.apply_chat_template([user(PROMPT)])
    _, out, _ = say(Chat(model, tokenizer, Options(8)), PROMPT, "/exit", as_json=True)
    assert json.loads(out) == {
        "text": tokenizer.decode(greedy(prompt, 8)),
        "finish_reason": "length",
        "prompt_tokens": len(prompt),
        "completion_tokens": 8,
    }


def test_raw_continues_each_line_by_itself(model, base_tokenizer, greedy, say):
    expected = base_tokenizer.decode(greedy(as_document(base_tokenizer, PROMPT), 8))
    chat = Chat(model, base_tokenizer, Options(8), raw=True)
    assert say(chat, PROMPT, PROMPT)[1] == f"{expected}\n{expected}\n"
    assert chat.messages == []


def test_a_conversation_that_fills_the_context_says_so(model, tokenizer, say):
    ok, out, err = say(Chat(model, tokenizer, Options(4)), "a b " * 100, "never read")
    assert (ok, out) == (False, "")
    assert "tokens of 128" in err
    assert "/reset" in err


def test_unknown_commands_are_named(model, tokenizer, say):
    ok, _, err = say(Chat(model, tokenizer, Options(4)), "/rest")
    assert (ok, err.startswith("/rest is no command. /reset starts anew")) == (True, True)


def test_the_answer_is_cut_to_the_context(model, tokenizer):
    *_, last = Chat(model, tokenizer, Options(10_000)).reply(PROMPT)
    prompt = tokenizer.apply_chat_template([user(PROMPT)])
    assert last.tokens == model.config.max_position_embeddings - len(prompt)


class Interrupted:
    """A model during whose second chunk the user presses Ctrl-C."""

    def __init__(self, tokenizer, config):
        self.ids = tokenizer.encode("Half [bold] \x1b[31m:smile:")
        self.config = config

    def stream(self, *_, **__):
        yield np.array([self.ids])
        raise KeyboardInterrupt


def test_ctrl_c_keeps_what_was_said_and_escapes_stay_harmless(model, tokenizer, say):
    chat = Chat(Interrupted(tokenizer, model.config), tokenizer, Options(4))
    ok, out, _ = say(chat, "Go")
    assert ok
    assert out == "Half [bold] \N{REPLACEMENT CHARACTER}[31m:smile: [stopped]\n"
    assert chat.messages[-1]["content"] == "Half [bold] \x1b[31m:smile:"
