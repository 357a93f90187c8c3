"""Text to token ids and back, in the Hugging Face file format."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import tokenizers
from tokenizers import decoders

from ds_model.byte_level_bpe import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, train_bpe
from ds_model.chat_template import DEEPSEEK_CHAT_TEMPLATE, Message, render
from ds_model.checkpoint import atomic
from ds_model.errors import TokenizerError
from ds_model.stream_decoder import StreamDecoder, byte_alphabet

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_FILE, _SETTINGS, _TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """Token ids of a text, and the text of token ids.

    Args:
        backend: the `tokenizers` object that does the work.
        settings: contents of `tokenizer_config.json`: `bos_token`, `eos_token`, `pad_token` and
            `chat_template` are used, the rest is kept.

    Attributes:
        chat_template: Jinja source, or `None`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
        self._backend = backend
        self._settings = settings
        self.chat_template: str | None = _template(settings.get("chat_template"))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        chat_template: str | None = DEEPSEEK_CHAT_TEMPLATE,
        show_progress: bool = False,
    ) -> Self:
        """Learn a byte-level BPE.

        Args:
            texts: any number of texts, read once.
            vocab_size: of the result, special tokens and the 256 bytes included; a small corpus
                may give fewer.
            special_tokens: ids from 0 on; those with DeepSeek's names get their role.
            chat_template: Jinja source for `apply_chat_template`.
            show_progress: bars on stderr.

        Raises:
            TokenizerError: `vocab_size` has no room for the bytes and the special tokens.
        """
        backend = train_bpe(texts, vocab_size, special_tokens, show_progress)
        roles = dict(zip(_ROLES, (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN), strict=False))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{role: token for role, token in roles.items() if token in special_tokens},
        }
        return cls(backend, settings | ({"chat_template": chat_template} if chat_template else {}))

    @classmethod
    def from_pretrained(cls, directory: Path | str) -> Self:
        """Read `tokenizer.json`, and `tokenizer_config.json` and `chat_template.jinja` if there.

        Raises:
            TokenizerError: no such file, or not a tokenizer.
        """
        directory = Path(directory)
        try:
            backend = tokenizers.Tokenizer.from_str((directory / _FILE).read_text("utf-8"))
        except FileNotFoundError as error:
            raise TokenizerError(f"{directory} holds no {_FILE}") from error
        except Exception as error:  # tokenizers raises just that on a bad file
            raise TokenizerError(f"{directory / _FILE} is no tokenizer: {error}") from error
        settings: dict[str, Any] = {}
        try:
            if (directory / _SETTINGS).exists():
                settings = json.loads((directory / _SETTINGS).read_text("utf-8"))
            if (directory / _TEMPLATE).exists():
                template = (directory / _TEMPLATE).read_text("utf-8")
                settings = {**settings, "chat_template": template}
        except (OSError, ValueError, TypeError) as error:
            raise TokenizerError(f"{directory / _SETTINGS} is not readable: {error}") from error
        if not isinstance(settings, dict):
            raise TokenizerError(f"{directory / _SETTINGS} must hold a JSON object")
        return cls(backend, settings)

    def save_pretrained(self, directory: Path | str) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, each whole or not at all.

        Raises:
            TokenizerError: the directory can't be written.
        """
        directory = Path(directory)
        settings = {key: value for key, value in self._settings.items() if key != "chat_template"}
        if self.chat_template is not None:
            settings["chat_template"] = self.chat_template
        written = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            atomic.write(directory / _FILE, self._backend.to_str(pretty=True).encode())
            atomic.write(directory / _SETTINGS, written.encode())
            (directory / _TEMPLATE).unlink(missing_ok=True)  # it would win over the new one
        except OSError as error:
            raise TokenizerError(f"{directory} can't be written: {error}") from error

    def to_json(self) -> str:
        """Return what `tokenizer.json` holds."""
        return self._backend.to_str()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model's `vocab_size` is this or more."""
        return self._backend.get_vocab_size()

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._role("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills a batch."""
        return self._role("pad_token")

    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its name; `None` if there is none."""
        return self._backend.token_to_id(token)

    def encode(
        self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text.

        Args:
            text: any text.
            add_special_tokens: add what the file's post-processor adds (a first token, often).
            split_special_tokens: read a special token's name in `text` as plain characters: for
                text of unknown origin, which must not end a document or open a turn.

        Raises:
            TokenizerError: the text has lone surrogates, which are no characters.
        """
        return self.encode_batch([text], add_special_tokens, split_special_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        add_special_tokens: bool = False,
        split_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Ids of several texts, on all cores; as `encode`."""
        backend = self._plain if split_special_tokens else self._backend
        try:
            encodings = backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"not text that can be encoded: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.

        Raises:
            TokenizerError: a negative id.
        """
        tokens = [int(token) for token in ids]
        if tokens and min(tokens) < 0:
            raise TokenizerError(f"token id {min(tokens)} is negative")
        return self._backend.decode(tokens, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token stands for; of a special one its name."""
        found = self._known_bytes.get(token)
        if found is None:
            name = self._backend.id_to_token(token) or ""
            if all(character in _ALPHABET for character in name):
                found = bytes(_ALPHABET[character] for character in name)
            else:
                found = name.encode()
            self._known_bytes[token] = found
        return found

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for one stream of ids as they are generated.

        Raises:
            TokenizerError: the tokenizer is not byte-level.
        """
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            raise TokenizerError("only byte-level tokenizers can be decoded as a stream")
        special = self._special_ids if skip_special_tokens else frozenset()
        return StreamDecoder(lambda token: b"" if token in special else self.token_bytes(token))

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        **variables: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        **variables: Any,
    ) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was taught to read it.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, in order.
            add_generation_prompt: end where the assistant's answer begins.
            tokenize: ids; else the text.
            **variables: what else the template may name, such as `tools`.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            message = f"the tokenizer has no chat_template: {_SETTINGS} names none"
            raise TokenizerError(message)
        tokens = {role: name for role in _ROLES if (name := self._name(role)) is not None}
        given = {"tools": None, "documents": None, **tokens, **variables}
        given["add_generation_prompt"] = add_generation_prompt
        text = render(self.chat_template, messages, **given)
        return self.encode(text) if tokenize else text

    @cached_property
    def _known_bytes(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token for token, added_token in added.items() if added_token.special)

    def _name(self, role: str) -> str | None:
        name = self._settings.get(role)
        return name.get("content") if isinstance(name, dict) else name

    def _role(self, role: str) -> int | None:
        name = self._name(role)
        return None if name is None else self._backend.token_to_id(name)


_ALPHABET = byte_alphabet()


def _template(value: object) -> str | None:
    """The template of a `chat_template` field: text, or a list of named ones."""
    if isinstance(value, list):  # tool use and the like may have templates of their own
        named = {item["name"]: item["template"] for item in value}
        value = named.get("default")
    return value if isinstance(value, str) else None
