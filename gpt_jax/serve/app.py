"""The application: routes, what stands before them, and the model behind them."""

import contextlib
import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gpt_jax.convert.open_model import OpenModel
from gpt_jax.decode.engine import Engine
from gpt_jax.serve import completions, embeddings, models, page, tokens
from gpt_jax.serve.auth import Keys
from gpt_jax.serve.chat import chat
from gpt_jax.serve.errors import ApiError, internal, unknown_route
from gpt_jax.serve.gate import Gate
from gpt_jax.serve.metrics import Metrics
from gpt_jax.serve.runner import Runner
from gpt_jax.serve.service import Service, writes_text
from gpt_jax.serve.settings import Settings
from gpt_jax.serve.warm_up import warm_up

_LOG = logging.getLogger("gpt_jax.serve")

_Handler = Callable[[Request, Service], Awaitable[Response]]


def make_app(
    opened: OpenModel, settings: Settings, *, make_engine: Callable[[], object] | None = None
) -> Starlette:
    """A server of one model.

    Args:
      opened: The model.
      settings: Limits and names.
      make_engine: Builds what generates; None: an Engine of the model.

    Returns:
      The application; its state.service is the Service. The engine starts with its lifespan.

    Raises:
      ValueError: the file of keys is none.
    """
    keys, metrics = Keys(settings.api_keys), Metrics()
    if make_engine is None and writes_text(opened):

        def make_engine() -> Engine:
            return Engine(
                opened.model, opened.params, vocab_size=opened.tokenizer.vocab_size,
                eos_ids=opened.eos_ids, max_slots=settings.slots,
                max_waiting=settings.max_waiting, prefill_chunk=settings.prefill_chunk,
                prefix_cache_tokens=settings.prefix_cache_tokens,
            )  # fmt: skip

    runner = Runner(make_engine, opened.tokenizer, metrics)
    service = Service(opened, settings, runner, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        runner.start(lambda engine: warm_up(engine, opened, settings.warm_up))
        yield
        service.close()

    middleware = [Middleware(Gate, service=service, keys=keys)]
    if settings.cors_origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"], allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id"],
        )  # fmt: skip
        middleware.insert(0, cors)
    app = Starlette(
        routes=[
            Route(path, _endpoint(handler, service), methods=[method])
            for method, path, handler in _ROUTES
        ],
        middleware=middleware,
        exception_handlers={404: _not_found, 405: _wrong_method},
        lifespan=lifespan,
    )
    # A path with a slash too many is another path.
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def health(request: Request, service: Service) -> Response:
    """200 where a request would be answered."""
    runner = service.runner
    if service.draining:
        state = "draining"
    elif not runner.is_ready:
        state = "starting"
    else:
        state = "stalled" if runner.is_stalled(service.settings.stall_timeout_s) else "ok"
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


async def metrics(request: Request, service: Service) -> Response:
    """For Prometheus."""
    runner = service.runner
    text = service.metrics.text({**runner.stats, "programs": runner.programs.count})
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


_ROUTES: tuple[tuple[str, str, _Handler], ...] = (
    ("POST", "/v1/completions", completions.completions),
    ("POST", "/v1/engines/{engine:path}/completions", completions.completions),
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/embeddings", embeddings.embeddings),
    ("POST", "/v1/engines/{engine:path}/embeddings", embeddings.embeddings),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{name:path}", models.one_model),
    ("GET", "/v1/engines", models.list_engines),
    ("GET", "/v1/engines/{name:path}", models.one_engine),
    ("POST", "/tokenize", tokens.tokenize),
    ("POST", "/detokenize", tokens.detokenize),
    ("GET", "/tokenizer_info", tokens.tokenizer_info),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/", page.page),
)


def _endpoint(handler: _Handler, service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request, service)
        except ApiError as error:
            return error.response()
        except Exception:
            _LOG.exception("%s failed", request.url.path)
            return internal().response()

    return endpoint


async def _not_found(request: Request, error: Exception) -> Response:
    return unknown_route(request.method, request.url.path).response()


async def _wrong_method(request: Request, error: Exception) -> Response:
    said = f"Not allowed to {request.method} on {request.url.path[:200]}."
    headers = dict(getattr(error, "headers", None) or {})
    return ApiError(405, said, code="method_not_supported", headers=headers).response()
