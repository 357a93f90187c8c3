"""What one client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; the model's own context bounds prompt and answer together.

    Attributes:
        max_new_tokens: most tokens of an answer, and what a chat that sets no bound gets.
        max_body_bytes: size of a request's body; a larger one is answered 413.
        body_seconds: time in which a body must have arrived; a slower one is answered 408.
        request_seconds: time after which an answer is given up.

    Raises:
        ValueError: a bound is too small.
    """

    max_new_tokens: int = 1024
    max_body_bytes: int = 1_000_000
    body_seconds: float = 30.0
    request_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("max_new_tokens", "max_body_bytes", "body_seconds", "request_seconds"):
            value = getattr(self, name)
            if value < (1 if isinstance(value, int) else 1e-3):
                raise ValueError(f"{name} is {value}; it must be 1 or more")
