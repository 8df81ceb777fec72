"""GET /v1/models and, for older clients, /v1/engines."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gpt_jax.serve.service import Service


def _model(service: Service, name: str) -> dict:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "gpt-jax"}


def _engine(service: Service, name: str) -> dict:
    return {"id": name, "object": "engine", "owner": "gpt-jax", "ready": service.runner.is_ready}


async def list_models(request: Request, service: Service) -> Response:
    """The model under each of its names."""
    return JSONResponse({"object": "list", "data": [_model(service, n) for n in service.names]})


async def one_model(request: Request, service: Service) -> Response:
    """The model, if it has this name."""
    return JSONResponse(_model(service, service.check_model(request.path_params["name"])))


async def list_engines(request: Request, service: Service) -> Response:
    """As models, in the older shape."""
    return JSONResponse({"object": "list", "data": [_engine(service, n) for n in service.names]})


async def one_engine(request: Request, service: Service) -> Response:
    """As a model, in the older shape."""
    return JSONResponse(_engine(service, service.check_model(request.path_params["name"])))
