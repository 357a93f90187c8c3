"""Errors as OpenAI's clients expect them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from ds_serve.engine import BusyError, ClosedError

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNSUPPORTED = "extra_forbidden"  # pydantic's name for a field that a model does not have
_VALUE_ERROR = "Value error, "  # what pydantic puts before the message of a ValueError


class ApiError(HTTPException):
    """A request that is refused.

    Args:
        message: one sentence: what is wrong and what would be right.
        param: name of the field at fault.
        code: OpenAI's code for it.
        status_code: of the answer.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status_code: int = HTTPStatus.BAD_REQUEST,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status_code, message, headers)
        self.param = param
        self.code = code


def error_body(message: str, status_code: int, param: str | None, code: str | None) -> str:
    """Return the JSON of an error, in ASCII: what a client sent need not be encodable."""
    server = status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    kind = "server_error" if server else "invalid_request_error"
    if status_code == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    if status_code == HTTPStatus.UNAUTHORIZED:
        kind = "authentication_error"
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def answer_in_openai_shape(app: FastAPI) -> None:
    """Give every error of the app that shape."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> Response:
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return _answer(error.detail, error.status_code, param, code, error.headers)

    @app.exception_handler(BusyError)
    async def full(_: Request, error: BusyError) -> Response:
        headers = {"Retry-After": str(error.retry_after)}
        busy = HTTPStatus.TOO_MANY_REQUESTS
        return _answer(f"The server is busy: {error}.", busy, None, "server_busy", headers)

    @app.exception_handler(ClosedError)
    async def closed(_: Request, __: ClosedError) -> Response:
        unavailable = HTTPStatus.SERVICE_UNAVAILABLE
        return _answer("The server is shutting down.", unavailable, None, "closing", None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param, code = _first_problem(error.errors()[0])
        return _answer(message, HTTPStatus.BAD_REQUEST, param, code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # Starlette logs the traceback; the client learns the kind and nothing of the inside.
        message = f"The server failed with {type(error).__name__}; its log says more."
        return _answer(message, HTTPStatus.INTERNAL_SERVER_ERROR, None, None)


def _first_problem(problem: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return message, field and code of one of pydantic's errors."""
    kind, (_, *location) = problem["type"], problem["loc"]
    if kind == "json_invalid":
        return f"The body is not valid JSON: {problem['ctx']['error']}.", None, "invalid_json"
    # A union's branches are parts of the location, and no fields.
    named = [str(part) for part in location if isinstance(part, int) or part.isidentifier()]
    field = ".".join(named)
    if not field and kind == "value_error":
        return f"{problem['msg'].removeprefix(_VALUE_ERROR)}.", None, "invalid_value"
    if not field:
        return "The body must be a JSON object, sent as application/json.", None, "invalid_json"
    if kind == _UNSUPPORTED:
        message = f"This server does not support {field}; leave it out."
        return message, field, "unsupported_parameter"
    if kind == "missing":
        return f"{field} is missing.", field, "missing_required_parameter"
    return f"{field}: {problem['msg'].removeprefix(_VALUE_ERROR)}.", field, "invalid_value"


def _answer(
    message: str,
    status_code: int,
    param: str | None,
    code: str | None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    body = error_body(message, status_code, param, code)
    return Response(body, status_code, headers, media_type="application/json")
