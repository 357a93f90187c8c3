"""One option: `nox -s parity -- --write-references` renews the reference files first."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-references",
        action="store_true",
        help="write the reference files of the packages' tests before comparing with them",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A layer without shared experts has weights of size zero, on purpose.
    config.addinivalue_line("filterwarnings", "ignore:Initializing zero-element tensors")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--write-references"):
        from parity import write_references  # noqa: PLC0415 - torch, only when asked for

        write_references.main()
