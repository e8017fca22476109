"""Fields of frozen dataclasses: convert them to their declared types, check them, build nested ones."""

from __future__ import annotations

import dataclasses
import sys
import typing
from typing import Any

from gross_ray.errors import InvalidValueError


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise InvalidValueError, naming the field, its value and the rule, unless `condition` holds."""
    if not condition:
        raise InvalidValueError(f"{name} = {value!r}: {rule}")


def require_group_sizes(name: str, sizes: tuple[int, ...]) -> None:
    """Raise InvalidValueError unless `sizes` are positive group-sizes without repeats."""
    lawful = all(size >= 1 for size in sizes) and len(set(sizes)) == len(sizes)
    require(lawful, name, sizes, "must be group-sizes of 1 or more, each named once")


def settle(options: Any, prefix: str) -> None:
    """Convert each field to its declared type (1 to 1.0, a list to a tuple): equal experiments have equal fingerprints.

    `prefix` stands before a field's name in errors, like ``training.``.
    """
    for name, hint in typing.get_type_hints(type(options)).items():
        object.__setattr__(options, name, convert(hint, getattr(options, name), prefix + name))


def build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    """Return a dataclass built from plain values, nested ones too.

    Raises InvalidValueError for an unknown or missing field, a wrong type or a value that breaks a rule.
    """
    hints = typing.get_type_hints(cls)
    unknown = [name for name in values if name not in hints]
    if unknown:
        known = ", ".join(prefix + name for name in hints)
        raise InvalidValueError(f"unknown field {prefix + unknown[0]!r}; there are: {known}")
    required = [one.name for one in dataclasses.fields(cls) if _has_no_default(one)]
    missing = [name for name in required if name not in values]
    if missing:
        raise InvalidValueError(f"{prefix}{missing[0]} is missing and has no default: give it a value")
    converted = {name: convert(hints[name], value, prefix + name) for name, value in values.items()}
    try:
        return cls(**converted)
    except InvalidValueError as error:
        message = str(error)
        owned = message.startswith(prefix) or "." in message.split(" = ")[0]
        raise InvalidValueError(message if owned else prefix + message) from None


def convert(hint: Any, value: Any, name: str) -> Any:
    """Return `value` converted to the type `hint`; raises InvalidValueError, naming the field, if it does not fit."""
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        if not isinstance(value, dict):
            raise InvalidValueError(
                f"{name} = {value!r}: is a group of fields; set one of them, like {name}.{_first(hint)}"
            )
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


def _has_no_default(one: dataclasses.Field[Any]) -> bool:
    return one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING


def _first(hint: Any) -> str:
    return dataclasses.fields(hint)[0].name
