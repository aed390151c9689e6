"""Every error in the same shape, whoever raises it: `{"error": {"code", "message", "field"}}`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from regraft.engine.data.source import GZIP_MAGIC
from regraft.engine.errors import nearest
from regraft.serve.schemas import Pair, PredictRequest, field_path
from regraft.serve.tickets import NotReady, Overloaded, TooLarge


class ClientGone(Exception):
    """Nobody reads the answer."""


def add_error_answers(app: FastAPI) -> None:
    """Every error in the same shape, whoever raises it."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_answer(422, "invalid_request", *_first_complaint(error))

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Overloaded) -> Response:
        return error_answer(429, "overloaded", str(error), headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(TooLarge)
    async def too_large(_: Request, error: TooLarge) -> Response:
        return error_answer(413, "request_too_large", str(error))

    @app.exception_handler(NotReady)
    async def not_ready(_: Request, error: NotReady) -> Response:
        return error_answer(503, "not_ready", str(error), headers={"Retry-After": "1"})

    @app.exception_handler(ClientGone)
    async def gone(_: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and isinstance(error.__cause__, ValueError | RecursionError):
            return error_answer(422, "invalid_request", _unreadable(error.__cause__, request))
        return error_answer(error.status_code, "http_error", str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return error_answer(500, "internal_error", f"{type(error).__name__}; see the server's log")


def _unreadable(cause: ValueError | RecursionError, request: Request) -> str:
    """What is wrong with a body that is not JSON in UTF-8: FastAPI says no more than that it could not be parsed."""
    expected = 'expected JSON in UTF-8, such as {"inputs": "a text"}'
    packed = request.headers.get("content-encoding", "identity")
    if isinstance(cause, RecursionError):
        return f"the body is nested too deeply; {expected}"
    if not isinstance(cause, UnicodeDecodeError):
        return f"the body cannot be read: {cause}; {expected}"
    if packed != "identity" or cause.object.startswith(GZIP_MAGIC):
        return f"the body is compressed ({'gzip' if packed == 'identity' else packed}); {expected}, not compressed"
    return f"the body has byte 0x{cause.object[cause.start]:02x} at position {cause.start + 1}; {expected}"


def _first_complaint(error: RequestValidationError) -> tuple[str, str | None]:
    """Message and field of one complaint: an unknown key before anything else, as it often explains the rest."""
    first = min(error.errors(), key=lambda complaint: complaint["type"] != "extra_forbidden")
    location = first["loc"]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']} at character {location[-1]}", None
    field = field_path(location)
    if not field:
        return 'the body must be a JSON object such as {"inputs": "a text"}, sent as application/json', None
    if first["type"] == "extra_forbidden":
        known = tuple((Pair if "<pair>" in location else PredictRequest).model_fields)
        message = f"unknown key{nearest(str(location[-1]), known)}; known are {', '.join(known)}"
    else:
        message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{field}: {message}", field


def error_answer(
    status: int, code: str, message: str, field: str | None = None, *, headers: Any = None
) -> JSONResponse:
    """`status` with the body that every error has."""
    return JSONResponse(
        {"error": {"code": code, "message": _writable(message), "field": field and _writable(field)}},
        status_code=status,
        headers=headers,
    )


def _writable(text: str) -> str:
    """A message may quote what the client sent; what cannot be written as UTF-8 is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
