"""The HTTP application: OpenAI's routes over an engine."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ds_serve.answering import StreamedAnswer, whole_answer
from ds_serve.body_limit import BodyLimit
from ds_serve.engine import Engine
from ds_serve.errors import ApiError, answer_in_openai_shape
from ds_serve.limits import Limits
from ds_serve.requests import ChatRequest, CompletionRequest, SamplingRequest
from ds_serve.responses import ChatFormat, Format, TextFormat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ds_model import CausalLM, Tokenizer


def create_app(
    model: CausalLM, tokenizer: Tokenizer, model_name: str, limits: Limits | None = None
) -> FastAPI:
    """Make an application that serves one model, one request at a time.

    Args:
        model: the model.
        tokenizer: its tokenizer, byte-level.
        model_name: what clients call it in the field `model`.
        limits: what one client may ask for.

    Returns:
        An ASGI application with `/health`, `/ready`, `/v1/models`, `/v1/completions` and
        `/v1/chat/completions`.

    Raises:
        ValueError: model and tokenizer do not belong together.
    """
    limits = limits or Limits()
    engine = Engine(model, tokenizer, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    # The pages at /docs would load scripts from elsewhere; /openapi.json needs nothing.
    app = FastAPI(
        title="ds-serve",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes)
    answer_in_openai_shape(app)
    app.include_router(_state_routes(engine))
    app.include_router(_model_routes(engine, model_name))
    app.include_router(_text_routes(engine, model_name))
    return app


def _state_routes(engine: Engine) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Say whether requests are taken, and how many there are."""
        state = {"status": "ready" if engine.open else "closing", "requests": engine.requests}
        code = HTTPStatus.OK if engine.open else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(state, code)

    return routes


def _model_routes(engine: Engine, model_name: str) -> APIRouter:
    routes = APIRouter(prefix="/v1/models")
    described = {
        "id": model_name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "ds-serve",
        "max_model_len": engine.context,
    }

    @routes.get("")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [described]}

    @routes.get("/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the model."""
        _check_name(name, model_name)
        return described

    return routes


def _text_routes(engine: Engine, model_name: str) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    async def answer(
        request: Request,
        body: SamplingRequest,
        prompt: list[int],
        max_tokens: int | None,
        form: Format,
    ) -> Response:
        job = engine.start(prompt, body, max_tokens)
        if body.stream:
            return StreamedAnswer(job, form, len(prompt), include_usage=body.include_usage)
        return await whole_answer(request, job, form, len(prompt))

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        _check_name(body.model, model_name)
        prompt = await engine.encode_prompt(body.prompt)
        return await answer(request, body, prompt, body.max_tokens, TextFormat(model_name))

    @routes.post("/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer in a conversation."""
        _check_name(body.model, model_name)
        prompt = await engine.encode_chat(body.messages)
        return await answer(request, body, prompt, body.max_answer, ChatFormat(model_name))

    return routes


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            f"There is no model {asked!r} here; this server has {served!r}.",
            param="model",
            code="model_not_found",
            status_code=HTTPStatus.NOT_FOUND,
        )
