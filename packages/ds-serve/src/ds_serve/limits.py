"""What one client may ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; the model's own context bounds prompt and answer together.

    Attributes:
        max_waiting: requests that may wait besides the one that is served; a further one is
            answered 429.
        max_new_tokens: most tokens of an answer, and what a chat that sets no bound gets. The
            latent cache is claimed for all of them at once.
        max_body_bytes: size of a request's body; a larger one is answered 413.

    Raises:
        ValueError: a bound is too small.
    """

    max_waiting: int = 16
    max_new_tokens: int = 1024
    max_body_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name, least in (("max_waiting", 0), ("max_new_tokens", 1), ("max_body_bytes", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
