"""What the models of requests share: types as JSON has them, and errors in plain words that name the place. Pure."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from common.errors import InvalidRequestError

MAX_NAME_CHARACTERS = 1024
MAX_FIELDS = 64
"""Of any object: more than a request has, served or not. Else each unknown one would be complained of."""


def described(description: str) -> WrapValidator:
    """Replaces the error of every branch of a union by one sentence."""

    def validate(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("wrong_type", "must be {description}", {"description": description}) from error

    return WrapValidator(validate)


Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]


class Strict(BaseModel):
    """Types are what JSON says: no "1" for 1, no true for 1, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, fields: object) -> object:
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"must have at most {MAX_FIELDS} fields")
        return fields


_VALIDATORS_WORDS = re.compile(r"^(?:Input|Value|String|Number|List|Dictionary|Object) should (be|have|match)")

_VALIDATORS_OBJECT = re.compile(r"a valid dictionary(?: or (?:an )?instance of \w+)?")


def first_error(error: ValidationError, known: frozenset[str]) -> InvalidRequestError:
    """The first of them. `known`: fields of a request that some route serves."""
    first = error.errors(include_url=False, include_input=False)[0]
    parameter = ""
    for part in first["loc"]:
        parameter += f"[{part}]" if isinstance(part, int) else f".{part}" if parameter else str(part)
    match first["type"]:
        case "extra_forbidden":
            message = "is not a field of this route" if parameter in known else "is not a field that this server knows"
        case "missing":
            message = "is required"
        case "no_content" | "no_calls":
            message = first["msg"]
            name, _, message = message.removeprefix("`").partition("`: ")
            parameter += f".{name}"
        case _:
            message = _VALIDATORS_WORDS.sub(r"must \1", first["msg"]).replace(" after validation", "")
            message = _VALIDATORS_OBJECT.sub("a JSON object", message)
    if not first["loc"]:
        return InvalidRequestError(f"the body {message}")
    return InvalidRequestError(f"`{parameter}`: {message}", parameter)
