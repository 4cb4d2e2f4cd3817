"""Dataclasses from the values of a JSON file, with every value checked against the type that its field declares.

A file written by other software may hold 3.0 or true for a count, a string for a list, or a number larger than 64
bits. Each of these raises one ValueError that names the field, instead of another error later.

Cost: one check per value.
"""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
MAX_INT = 2**63 - 1
"""The largest accepted integer: counts and offsets are kept as int64."""


def typed(cls: type[T], value: object, *, where: str = "") -> T:
    """Convert ``value``, read from JSON, to a ``cls``.

    Args:
        cls: bool, int (of 64 bits), float (finite), str, ``Any``, a dataclass, a ``NamedTuple``, or list, tuple, dict
            and unions of them.
        where: the name of ``value`` in messages.

    Raises:
        ValueError: a value has another type; a field of a dataclass is missing or unknown.
    """
    return _typed(cls, value, where)


def _typed(cls: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(cls), typing.get_args(cls)
    if cls is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _typed(next(member for member in inner if member is not type(None)), value, where)
    if is_dataclass(cls):
        return _typed_fields(cls, value, where)
    if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields"):  # a NamedTuple, kept as a list
        hints = typing.get_type_hints(cls)
        _require(isinstance(value, list) and len(value) == len(hints), value, where, f"a list of {len(hints)}")
        items = zip(hints.values(), value, strict=True)
        return cls(*(_typed(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(items)))
    if origin in (list, tuple):
        _require(isinstance(value, list), value, where, "a list")
        return origin(_typed(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict or cls is dict:
        _require(isinstance(value, dict), value, where, "an object")
        item_type = inner[1] if inner else Any
        return {key: _typed(item_type, item, f"{where}[{key!r}]") for key, item in value.items()}
    if cls is int:
        _require(type(value) is int, value, where, "a whole number")
        _require(-MAX_INT <= value <= MAX_INT, value, where, "a number of 64 bits")
        return value
    if cls is float:
        finite = type(value) in (int, float) and abs(value) <= 1.7e308 and math.isfinite(value)
        _require(finite, value, where, "a finite number")
        return float(value)
    _require(isinstance(value, cls), value, where, {str: "string", bool: "true or false"}.get(cls, cls.__name__))
    return value


def _typed_fields(cls: Any, value: object, where: str) -> Any:
    _require(isinstance(value, Mapping), value, where, "an object")
    assert isinstance(value, Mapping)
    hints, declared = _declared(cls)
    inside = f"{where}: " if where else ""
    if unknown := sorted(map(str, value.keys() - declared.keys())):
        raise ValueError(f"{inside}has the unknown field {unknown[0][:80]!r}")
    missing = [
        name
        for name, field in declared.items()
        if name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{inside}has no field {missing[0]!r}")
    prefix = f"{where}." if where else ""
    return cls(**{name: _typed(hints[name], item, prefix + name) for name, item in value.items()})


@cache
def _declared(cls: Any) -> tuple[dict[str, Any], dict[str, Field]]:
    """The types and the fields of a dataclass by name; an index may hold a million of one class."""
    return typing.get_type_hints(cls), {field.name: field for field in fields(cls) if field.init}


def _require(holds: bool, value: object, where: str, expected: str) -> None:
    if not holds:
        shown = f" {value!r}"[:80] + "," if isinstance(value, (int, float, str)) else ""
        raise ValueError(f"{where or 'the content'} is{shown} of type {type(value).__name__}: expected {expected}")
