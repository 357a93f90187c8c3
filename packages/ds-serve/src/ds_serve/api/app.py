"""The HTTP application: OpenAI's routes over an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from ds_serve.api.answering import StreamedAnswer, embeddings, whole_answer
from ds_serve.api.body_limit import BodyLimit
from ds_serve.api.errors import ApiError, answer_in_openai_shape
from ds_serve.api.generation import Generation
from ds_serve.api.inside import describe
from ds_serve.api.keys import Keys
from ds_serve.api.limits import Limits
from ds_serve.api.metrics import CONTENT_TYPE, Metrics
from ds_serve.api.naming import Naming
from ds_serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    SamplingRequest,
)
from ds_serve.api.responses import ChatFormat, Format, TextFormat
from ds_serve.api.served import Served
from ds_serve.api.tracing import Tracing
from ds_serve.api.watching import Watch
from ds_serve.engine import Engine, EngineOptions

if TYPE_CHECKING:
    from ds_model import CausalLM, Tokenizer

# The page runs its own files and speaks to this server, and to nobody else.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(
    model: CausalLM,
    tokenizer: Tokenizer,
    model_name: str,
    limits: Limits | None = None,
    options: EngineOptions | None = None,
    keys: Keys | None = None,
    tracing: Tracing | None = None,
    grace: float = 30.0,
    engine: Engine | None = None,
) -> FastAPI:
    """Make an application that serves one model to many clients at once.

    Args:
        model: the model.
        tokenizer: its tokenizer, byte-level.
        model_name: what clients call it in the field `model`.
        limits: what one client may ask for.
        options: how much is done at once.
        keys: who may ask; everybody if `None`.
        tracing: where traces go; nowhere if `None`.
        grace: seconds that running answers get when the server shuts down.
        engine: an engine of this model that is warm already, in place of one made by `options`.

    Returns:
        An ASGI application with a page at `/`, and `/health`, `/ready`, `/metrics`, `/v1/models`,
        `/v1/completions`, `/v1/chat/completions` and `/v1/embeddings`.

    Raises:
        ValueError: model, tokenizer and options do not belong together.
    """
    limits, keys, tracing = limits or Limits(), keys or Keys(), tracing or Tracing()
    engine = engine or Engine(model, options)
    served = Served(model, tokenizer, model_name, engine, limits)
    metrics = Metrics(served)
    engine.observers.append(metrics.observe)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close(0)
        tracing.close()

    # The pages at /docs would load scripts from elsewhere; /openapi.json needs nothing.
    app = FastAPI(title="ds-serve", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.grace = engine, grace
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, seconds=limits.body_seconds)
    app.add_middleware(Naming, metrics=metrics)
    answer_in_openai_shape(app)
    app.include_router(_state_routes(served, metrics))
    app.include_router(_model_routes(served, keys))
    app.include_router(_text_routes(served, metrics, keys, tracing))
    app.include_router(_page_routes())
    return app


def _page_routes() -> APIRouter:
    routes, folder = APIRouter(include_in_schema=False), files("ds_serve") / "page"

    def add(path: str, name: str) -> None:
        @routes.get(path)
        async def file() -> Response:
            return FileResponse(str(folder / name), headers=_PAGE_HEADERS)

    add("/", "index.html")
    for name in ("app.js", "style.css", "icon.svg"):
        add(f"/{name}", name)
    return routes


def _state_routes(served: Served, metrics: Metrics) -> APIRouter:
    routes, engine = APIRouter(), served.engine

    @routes.get("/health")
    async def health() -> JSONResponse:
        """Say that the process lives and its engine works."""
        if engine.failed:
            return JSONResponse({"status": "failed"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ok"})

    @routes.get("/ready")
    async def ready() -> JSONResponse:
        """Say whether requests are taken, and how many there are."""
        state = {"status": "ready" if engine.open else "closing", "requests": engine.texts}
        code = HTTPStatus.OK if engine.open else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse(state, code)

    @routes.get("/metrics")
    async def figures() -> Response:
        """Give Prometheus its figures."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return routes


def _model_routes(served: Served, keys: Keys) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    described = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "ds-serve",
        "max_model_len": served.context,
    }

    @routes.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the one model."""
        keys.name_of(request.headers.get("authorization"))
        return {"object": "list", "data": [described]}

    @routes.get("/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        """Describe the model."""
        keys.name_of(request.headers.get("authorization"))
        _check_name(name, served.name)
        return described

    @routes.get("/inside")
    async def inside(request: Request) -> dict[str, Any]:
        """Say what the model is made of: for the page; not OpenAI's."""
        keys.name_of(request.headers.get("authorization"))
        return describe(served)

    return routes


def _text_routes(served: Served, metrics: Metrics, keys: Keys, tracing: Tracing) -> APIRouter:
    routes = APIRouter(prefix="/v1")

    @contextmanager
    def watched(request: Request) -> Iterator[Watch]:
        """Admit a request, and hold its place until its answer ends, or none begins."""
        request.state.key = key = keys.name_of(request.headers.get("authorization"))
        place = ExitStack()
        place.enter_context(keys.admitted(key))
        try:
            yield Watch(request, metrics, keys, tracing, place.close)
        except BaseException:
            place.close()
            raise

    async def answer(
        request: Request, body: SamplingRequest, generation: Generation, form: Format, watch: Watch
    ) -> Response:
        if body.stream:
            return StreamedAnswer(generation, form, watch, include_usage=body.include_usage)
        return await whole_answer(request, generation, form, watch)

    @routes.post("/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue texts."""
        with watched(request) as watch:
            _check_name(body.model, served.name)
            prompts = await served.encode_prompts(body.prompt)
            echoes = [served.tokenizer.decode(ids) for ids in prompts] if body.echo else []
            echoes = [text for text in echoes for _ in range(body.n)]
            form = TextFormat(
                model=served.name,
                tokenizer=served.tokenizer,
                logprobs=body.logprobs,
                experts=body.experts,
                echoes=echoes,
            )
            generation = await served.complete(body, prompts)
            return await answer(request, body, generation, form, watch)

    @routes.post("/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer in a conversation."""
        with watched(request) as watch:
            _check_name(body.model, served.name)
            prompt = await served.encode_chat(body)
            form = ChatFormat(
                model=served.name,
                tokenizer=served.tokenizer,
                thinking=prompt.thinking,
                reasons=served.reasons,
                tools=bool(body.tools) and body.tool_choice != "none",
                logprobs=body.logprobs,
                experts=body.experts,
            )
            generation = await served.chat(body, prompt)
            return await answer(request, body, generation, form, watch)

    @routes.post("/embeddings")
    async def embed(request: Request, body: EmbeddingRequest) -> Response:
        """Return the last hidden state of texts."""
        with watched(request) as watch:
            _check_name(body.model, served.name)
            generation = await served.embed(body)
            return await embeddings(request, generation, served.name, body.encoding_format, watch)

    return routes


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        raise ApiError(
            f"There is no model {asked!r} here; this server has {served!r}.",
            param="model",
            code="model_not_found",
            status_code=HTTPStatus.NOT_FOUND,
        )
