"""Errors of the server in the form that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ValidationError


class ErrorBody(BaseModel):
    """What an error says."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of a response that is an error."""

    error: ErrorBody


@dataclass(eq=False)
class ApiError(Exception):
    """An error with its HTTP status."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None

    def body(self) -> ErrorResponse:
        """The response's body."""
        return ErrorResponse(error=ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code))


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def overloaded(message: str) -> ApiError:
    """More requests than the queue holds."""
    return ApiError(429, message, type="rate_limit_error", code="rate_limit_exceeded")


def server_error(message: str, status: int = 500, code: str | None = None) -> ApiError:
    """What is not the request's fault."""
    return ApiError(status, message, type="server_error", code=code)


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a request's body; its values are not repeated."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return bad_request(f"unrecognized request argument: {param}", param, "unknown_parameter")
    where = "the body" if param is None else param
    return bad_request(f"{where}: {first['msg'].removeprefix('Value error, ')}", param, "invalid_value")
