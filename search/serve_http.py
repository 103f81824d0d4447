"""The protocol over HTTP: a FastAPI application for one model. It knows nothing of Ray."""

import math
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..kernels import Array, Inputs
from ..spaces import BadInput, Impossible
from .serve_protocol import HEADER, Protocol, Tensor

Infer = Callable[[Inputs], Awaitable[Array]]
ERROR = {
    "description": "What is wrong, and what to do: {error}",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"error": {"type": "string"}},
                "required": ["error"],
            }
        }
    },
}


def make_app(protocol: Protocol, platform: str, infer: Infer, most_bytes: int) -> FastAPI:
    """An application that answers for one model.

    infer: the output of valid inputs; raises Impossible where the model cannot take their values.
    most_bytes: a longer body is refused (413).
    """
    name = protocol.name
    app = FastAPI(
        title=f"flyweight: {name}",
        description="Open Inference Protocol v2 for one model.",
        version=version("flyweight"),
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )

    @app.get("/v2", summary="The server and what it can do")
    def server() -> dict[str, Any]:
        return {
            "name": "flyweight",
            "version": version("flyweight"),
            "extensions": ["binary_tensor_data"],
        }

    @app.get("/v2/health/live", summary="Whether the server runs")
    def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether the model answers")
    def ready() -> dict[str, bool]:
        return {"ready": True}  # a replica gets requests once its model is warm

    def metadata() -> dict[str, Any]:
        return {
            "name": name,
            "versions": [protocol.version],
            "platform": platform,
            "inputs": [tensor.metadata() for tensor in protocol.inputs.values()],
            "outputs": [tensor.metadata() for tensor in protocol.outputs.values()],
        }

    def model_ready() -> dict[str, Any]:
        return {"name": name, "ready": True}

    async def answer(request: Request) -> Response:
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise HTTPException(415, f"content-encoding must be identity, but got {encoding!r}")
        body = await _read(request, most_bytes)
        try:
            asked = protocol.read(body, request.headers.get(HEADER))
            content, head = protocol.answer(asked, await infer(asked.inputs))
        except BadInput as error:
            raise HTTPException(400, str(error)) from error
        except Impossible as error:
            said = f"the model cannot take these values: {error}"
            raise HTTPException(400, said) from error
        if head is None:
            return Response(content, media_type="application/json")
        return Response(content, headers={HEADER: head}, media_type="application/octet-stream")

    for place in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{protocol.version}"):
        app.get(place, summary="The model's inputs and outputs")(metadata)
        app.get(f"{place}/ready", summary="Whether the model answers")(model_ready)
        app.post(
            f"{place}/infer",
            summary="The model's answer",
            openapi_extra={"requestBody": _body(protocol)},
            responses={200: _response(protocol), 400: ERROR, 413: ERROR, 415: ERROR},
        )(answer)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        said = str(error.detail)
        if error.status_code == 404:
            said = (
                f"nothing at {request.url.path}; the model is at /v2/models/{name}, and the "
                f"version that answers is {protocol.version}"
            )
        return JSONResponse({"error": said}, error.status_code, headers=error.headers)

    return app


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    length = request.headers.get("content-length", "")
    async for part in request.stream():
        size += len(part)
        if max(size, int(length) if length.isdecimal() else 0) > most:
            raise HTTPException(
                413,
                f"a body may have at most {most} bytes; send fewer rows at once, send binary data "
                "instead of JSON, or serve with a larger --max-body-mb",
            )
        parts.append(part)
    return b"".join(parts)


def _body(protocol: Protocol) -> dict[str, Any]:
    each = [_tensor(tensor) for tensor in protocol.inputs.values()]
    outputs = {
        "type": "object",
        "properties": {"name": {"enum": [*protocol.outputs]}, "parameters": {"type": "object"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    example = {"inputs": [_example(tensor) for tensor in protocol.inputs.values()]}
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {
                "type": "array",
                "items": {"oneOf": each} if len(each) > 1 else each[0],
                "minItems": len(each),
                "maxItems": len(each),
            },
            "outputs": {"type": "array", "items": outputs},
        },
        "required": ["inputs"],
        "additionalProperties": False,
        "example": example,
    }
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _response(protocol: Protocol) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {
            "model_name": {"const": protocol.name},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {
                "type": "array",
                "items": _tensor(protocol.output),
                "minItems": 1,
                "maxItems": 1,
            },
        },
        "required": ["model_name", "model_version", "outputs"],
    }
    return {"description": "The answer", "content": {"application/json": {"schema": schema}}}


def _example(tensor: Tensor) -> dict[str, Any]:
    shape = [1 if size is None else size for size in tensor.shape]
    data = [False if tensor.datatype == "BOOL" else 0] * math.prod(shape)
    return {"name": tensor.name, "shape": shape, "datatype": tensor.datatype, "data": data}


def _tensor(tensor: Tensor) -> dict[str, Any]:
    """The JSON schema of a tensor; its data may be nested as its shape, or flat."""
    sizes = [
        {"type": "integer", "minimum": 1} if size is None else {"const": size}
        for size in tensor.shape
    ]
    value = {"BOOL": "boolean", "FP": "number"}.get(tensor.datatype.rstrip("0123456789"), "integer")
    data: dict[str, Any] = {"type": value}
    for _ in tensor.shape:
        data = {"type": "array", "items": data}
    flat = {"type": "array", "items": {"type": value}}
    return {
        "type": "object",
        "properties": {
            "name": {"const": tensor.name},
            "shape": {
                "type": "array",
                "prefixItems": sizes,
                "minItems": len(sizes),
                "maxItems": len(sizes),
            },
            "datatype": {"const": tensor.datatype},
            "parameters": {"type": "object"},
            "data": {"anyOf": [flat, data]} if len(sizes) > 1 else flat,
        },
        "required": ["name", "shape", "datatype", "data"],
        "additionalProperties": False,
    }
