"""Checks values that were read from a file against a pydantic model, with errors in one line."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Count = Annotated[int, Field(ge=0, lt=2**53)]  # exact as a float, too
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Schema(BaseModel):
    """Base of schemas. Types are not converted, numbers are finite, and keys that are not fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


Model = TypeVar("Model")


def checked(kind: type[Model], value, place: str = "") -> Model:
    """Returns `value` as a `kind`. Raises ValueError: "place: key.key: what is wrong", for the first problem."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        keys = ".".join(map(str, problem["loc"]))
        raise ValueError(": ".join(filter(None, (place, keys, problem["msg"].removeprefix("Value error, "))))) from None
