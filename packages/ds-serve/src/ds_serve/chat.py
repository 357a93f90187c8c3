"""The terminal chat: reads lines, writes the model's text as it comes."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from ds_serve.writing import Options, Pieces, encode_text, write

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer

HELP = "/reset starts anew, /exit ends (as does Ctrl-D), Ctrl-C stops an answer."

# A model may write escape sequences, and a terminal would obey them.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
_VISIBLE = {code: "\N{REPLACEMENT CHARACTER}" for code in _CONTROLS if chr(code) not in "\n\t"}


class Chat:
    """A conversation with a model.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a chat template unless `raw`.
        options: how to write; `max_tokens` is cut to what the context leaves.
        system: instruction that stands before the conversation.
        raw: continue each text by itself, without a template.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        options: Options,
        system: str | None = None,
        *,
        raw: bool = False,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._raw = raw
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages = list(self._opening)
        self.prompt_tokens = 0

    def reply(self, text: str) -> Pieces:
        """Answer a message, and remember both as far as the answer was read.

        Raises:
            ValueError: the text can't be encoded, or the context has no room for an answer.
        """
        turn = {"role": "user", "content": text}
        prompt = self._encode(text, [*self.messages, turn])
        config = self._model.config
        room = config.max_position_embeddings - len(prompt)
        if not prompt or room < 1:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens of {config.max_position_embeddings}; "
                "an answer needs one at least: /reset starts anew"
            )
        o = self._options
        cut = Options(min(o.max_tokens, room), o.temperature, o.top_p, o.seed, o.stop)
        self.prompt_tokens = len(prompt)
        return self._remembered(turn, write(self._model, self._tokenizer, prompt, cut))

    def _remembered(self, turn: dict[str, str], pieces: Pieces) -> Pieces:
        written = ""
        try:
            for piece in pieces:
                written += piece.text
                yield piece
        finally:
            if not self._raw:
                self.messages += [turn, {"role": "assistant", "content": written}]

    def _encode(self, text: str, messages: list[dict[str, str]]) -> list[int]:
        if self._raw:
            return encode_text(self._tokenizer, text)
        return self._tokenizer.apply_chat_template(messages)


def talk(chat: Chat, *, as_json: bool = False) -> bool:
    """Read messages from standard input until it ends or says /exit.

    Args:
        chat: the conversation.
        as_json: write one JSON object a reply, and nothing else.

    Returns:
        Whether every message was answered. From a pipe the first failure ends the talk.
    """
    typed = sys.stdin.isatty()
    console, errors = Console(), Console(stderr=True)
    if typed and not as_json:
        errors.print(HELP, style="dim")
    while (line := _read(console if typed and not as_json else None)) is not None:
        match line.strip():
            case "":
                pass
            case "/exit":
                break
            case "/reset":
                chat.reset()
            case word if word.startswith("/") and " " not in word:
                errors.print(f"{word} is no command. {HELP}", style="dim", markup=False)
            case message:
                try:
                    pieces = chat.reply(message)
                except ValueError as error:
                    errors.print(str(error), style="red", markup=False)
                    if not typed:
                        return False
                else:
                    (_show_json if as_json else _show)(chat, pieces, console)
    return True


def _read(console: Console | None) -> str | None:
    """Return the next line, or None at the end."""
    try:
        if console is not None:
            return console.input("[bold cyan]>[/] ")
        return sys.stdin.readline() or None
    except (EOFError, KeyboardInterrupt):
        return None


def _show(_: Chat, pieces: Pieces, console: Console) -> None:
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                console.out(piece.text.translate(_VISIBLE), end="", highlight=False)
                console.file.flush()
    except KeyboardInterrupt:
        console.out(" [stopped]", end="", highlight=False)
    console.out("")


def _show_json(chat: Chat, pieces: Pieces, _: Console) -> None:
    parts = list(pieces)
    answer = {
        "text": "".join(piece.text for piece in parts),
        "finish_reason": parts[-1].finish_reason,
        "prompt_tokens": chat.prompt_tokens,
        "completion_tokens": parts[-1].tokens,
    }
    sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
    sys.stdout.flush()
