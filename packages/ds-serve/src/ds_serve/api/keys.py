"""Who may ask, and how often: keys from a file, each with limits of its own.

```toml
[keys.alice]
key = "sk-..."               # or sha256 = "...", its SHA-256 in hexadecimal
requests_per_minute = 60     # each of these three may be left out: no limit
tokens_per_minute = 100000   # of prompts and answers, counted when an answer is done
requests_at_once = 4
```
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Self

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ds_serve.api.errors import ApiError

_MINUTE = 60


class KeysError(ValueError):
    """A file of keys is wrong; the message names what."""


class Key(BaseModel):
    """One key and its limits; `None` is no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str | None = Field(None, min_length=8)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    requests_at_once: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give key or sha256")
        return self

    @property
    def digest(self) -> str:
        """The key's SHA-256 in hexadecimal."""
        if self.sha256 is not None:
            return self.sha256
        return hashlib.sha256((self.key or "").encode()).hexdigest()


class Keys:
    """The keys of a server; without any everybody may ask.

    Args:
        keys: by the name of who holds them.
    """

    def __init__(self, keys: dict[str, Key] | None = None) -> None:
        self._keys = keys or {}
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._at_once: Counter[str] = Counter()

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a TOML file; see the head of this module.

        Raises:
            ValueError: the file is unreadable or wrong; names what.
        """
        try:
            tables = tomllib.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise KeysError(f"{path} can't be read: {error}") from error
        if set(tables) != {"keys"} or not isinstance(tables["keys"], dict) or not tables["keys"]:
            raise KeysError(f"{path} must hold tables [keys.NAME], at least one, and nothing else")
        found = {}
        for name, table in tables["keys"].items():
            try:
                found[name] = Key.model_validate(table)
            except ValidationError as error:
                problem = error.errors()[0]
                field = ".".join(map(str, problem["loc"]))
                raise KeysError(f"{path}: keys.{name} {field}: {problem['msg']}") from error
        return cls(found)

    def name_of(self, authorization: str | None) -> str:
        """Return whose key a request bears, in its header `Authorization`.

        Raises:
            ApiError: 401, it bears none that is known.
        """
        if not self._keys:
            return "anyone"
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "replace")).hexdigest()
        # All are compared, each in constant time: how long it takes tells nothing.
        names = [n for n, known in self._keys.items() if hmac.compare_digest(known.digest, given)]
        if scheme.lower() != "bearer" or not names:
            raise ApiError(
                "The key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                status_code=HTTPStatus.UNAUTHORIZED,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return names[0]

    @contextmanager
    def admitted(self, name: str) -> Iterator[None]:
        """Count a request of a key, until the context ends.

        Raises:
            ApiError: 429, a limit is reached; says which, and when to come back.
        """
        key = self._keys.get(name)
        if key is None:
            yield
            return
        if key.requests_at_once is not None and self._at_once[name] >= key.requests_at_once:
            raise _too_many(f"{key.requests_at_once} requests at once", 1)
        if key.tokens_per_minute is not None:
            item = RateLimitItemPerMinute(key.tokens_per_minute)
            if not self._limiter.test(item, "tokens", name):
                self._refuse(item, "tokens", name, f"{key.tokens_per_minute} tokens a minute")
        if key.requests_per_minute is not None:
            item = RateLimitItemPerMinute(key.requests_per_minute)
            if not self._limiter.hit(item, "requests", name):
                self._refuse(item, "requests", name, f"{key.requests_per_minute} requests a minute")
        self._at_once[name] += 1
        try:
            yield
        finally:
            self._at_once[name] -= 1

    def spent(self, name: str, tokens: int) -> None:
        """Count the tokens of an answer that is done."""
        key = self._keys.get(name)
        if key is None or key.tokens_per_minute is None or not tokens:
            return
        item = RateLimitItemPerMinute(key.tokens_per_minute)
        # A cost beyond what is left would be refused and not counted: what is left is taken then.
        left = self._limiter.get_window_stats(item, "tokens", name).remaining
        self._limiter.hit(item, "tokens", name, cost=max(1, min(tokens, left)))

    def _refuse(self, item: RateLimitItemPerMinute, what: str, name: str, allowed: str) -> None:
        reset = self._limiter.get_window_stats(item, what, name).reset_time
        raise _too_many(allowed, max(1, min(_MINUTE, math.ceil(reset - time.time()))))


def _too_many(allowed: str, seconds: int) -> ApiError:
    return ApiError(
        f"This key is allowed {allowed}; try again in {seconds} s.",
        code="rate_limit_exceeded",
        status_code=HTTPStatus.TOO_MANY_REQUESTS,
        headers={"Retry-After": str(seconds)},
    )
