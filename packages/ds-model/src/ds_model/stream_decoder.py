"""Text from tokens as they arrive, never half a character.

A byte-level token is any run of bytes, so one character may need several tokens. The decoder
holds bytes back until they complete a UTF-8 character; what can't become one is U+FFFD, at the
place and in the number in which decoding everything at once gives it.
"""

import codecs
from collections.abc import Callable, Iterable


class StreamDecoder:
    """Feed ids with `push`, end with `finish`; the pieces joined are the whole text.

    Args:
        token_bytes: bytes of a token id; empty for one that is not text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that `ids` (one or several) complete; may be empty."""
        arrived = (ids,) if isinstance(ids, int) else ids
        return self._utf8.decode(b"".join(self._token_bytes(int(token)) for token in arrived))

    def finish(self) -> str:
        """What was held back, as U+FFFD; the decoder then starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def byte_alphabet() -> dict[str, int]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
