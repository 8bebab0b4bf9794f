"""JSON answers and errors, in OpenAI's shapes."""

from __future__ import annotations

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from common.errors import InvalidRequestError, MoemeshError, OverloadedError
from services.router.front.replies import JsonObject, encode_json, error_body

log = structlog.get_logger(__name__)


def json_answer(body: JsonObject, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A whole answer."""
    return Response(encode_json(body), status, headers, media_type="application/json")


def error_answer(error: Exception) -> Response:
    """With the status of the error; what is no MoemeshError is a defect, and logged as one."""
    log_error(error)
    status = error.http_status if isinstance(error, MoemeshError) else 500
    headers = {"retry-after": str(error.retry_after_s)} if isinstance(error, OverloadedError) else None
    return json_answer(error_body(error), status, headers)


def log_error(error: Exception) -> None:
    """What is not the client's fault."""
    if not isinstance(error, MoemeshError):
        log.error("request_failed_by_defect", exc_info=error)
    elif error.http_status >= 500:
        log.warning("request_failed", code=error.code, reason=error.message)


async def answer_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    error_text = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(InvalidRequestError(error_text))
    body["error"]["code"] = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return json_answer(body, error.status_code, dict(error.headers or {}))
