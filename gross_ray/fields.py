"""Convert, check and build the fields of frozen dataclasses."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from typing import Any

from gross_ray.errors import InvalidValueError

EARLIER = "earlier"
"""Key of a text field's metadata: a mapping from values of earlier versions, as JSON, to those that replace them."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise InvalidValueError, naming the field, its value and the rule, unless `condition` holds."""
    if not condition:
        raise InvalidValueError(f"{name} = {value!r}: {rule}")


def require_group_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raise InvalidValueError unless `sizes` are positive group-sizes without repeats."""
    valid = all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes)
    require(valid, name, sizes, "must be group-sizes of 1 or more, each named once")


def settle(options: Any, prefix: str) -> None:
    """Convert each field to its declared type (1 to 1.0, a list to a tuple), so that equal options compare equal.

    `prefix` precedes a field's name in errors, like ``training.``.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        value = _of_today(type(options), name, getattr(options, name))
        object.__setattr__(options, name, convert(hint, value, prefix + name))


def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Build a dataclass, and those nested in it, from plain values.

    Raises InvalidValueError for an unknown or missing field, a wrong type or a value that breaks a rule.
    """
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        raise InvalidValueError(f"unknown field {prefix + unknown[0]!r}; known fields: {known}")
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InvalidValueError(f"{prefix}{missing[0]} is missing and has no default: set it")
    converted = {
        name: convert(hints[name], _of_today(cls, name, value), prefix + name) for name, value in values.items()
    }
    try:
        return cls(**converted)
    except InvalidValueError as error:
        message = str(error)
        has_prefix = message.startswith(prefix) or "." in message.split(" = ")[0]
        raise InvalidValueError(message if has_prefix else prefix + message) from None


def _of_today(cls: type, name: str, value: Any) -> Any:
    """Return the value that replaces `value` of an earlier version in the field `name` (EARLIER), or `value`."""
    replaced = cls.__dataclass_fields__[name].metadata.get(EARLIER)  # type: ignore[attr-defined]
    if replaced is None or not isinstance(value, bool | str):
        return value
    return replaced.get(json.dumps(value) if isinstance(value, bool) else value, value)


def convert(hint: Any, value: Any, name: str) -> Any:
    """Return `value` converted to the type `hint`; raises InvalidValueError, naming the field, if it does not fit."""
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if not isinstance(value, dict):
            example = dataclasses.fields(hint)[0].name
            raise InvalidValueError(f"{name} = {value!r}: is a group of fields; set one of them, like {name}.{example}")
        return build(typing.cast(type, hint), value, f"{name}.")
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(typing.get_args(hint)[0], item, name) for item in items)
    accepted = int | float if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise InvalidValueError(f"{name} = {value!r}: must be of type {hint.__name__}")
    if hint is not float:
        return value
    require(abs(value) <= sys.float_info.max, name, value, "must be a finite number")
    return float(value) + 0.0  # -0.0 becomes 0.0, to which it is equal
