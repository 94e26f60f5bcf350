"""JSON from strangers as a dataclass: every entry there, none too many, each of its type."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pmm_edge.spec import ModelSpec


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN, infinity, or text that a terminal would obey.

    Raises:
        ValueError: it is something else.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice in it")
        for word in (*found, *found.values()):
            _check_text(word)
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no figure")

    try:
        content = json.loads(text, object_pairs_hook=once, parse_constant=no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def strictly(kind: Any, value: Any, where: str = "it") -> Any:
    """Build `kind` from plain JSON values.

    Args:
        kind: a dataclass, ModelSpec, str, int, float, bool, `list[T]`, `dict[str, T]`, or `T | None` of one of them.
        value: what JSON gave.
        where: what to call the value in messages.

    Raises:
        ValueError: an entry is missing, unknown, of another type, or not finite.
        ModelError: the spec in it cannot be read.
    """
    if kind is ModelSpec:
        return ModelSpec.from_json(json.dumps(value))
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else strictly(inner, value, where)
    if origin is list and isinstance(value, list):
        for entry in value:
            _check_text(entry)
        return [strictly(arguments[0], entry, where) for entry in value]
    if origin is dict and isinstance(value, dict):
        return {name: strictly(arguments[1], entry, f"{where}.{name}") for name, entry in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (str, int, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is not what it must be")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not what it must be")
    hints, names = get_type_hints(kind), {field.name for field in fields(kind)}
    if missing := names - value.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - names:
        raise ValueError(f"{where} has unknown entries: {', '.join(map(ascii, sorted(unknown)[:5]))}")
    return kind(**{name: strictly(hints[name], value[name], name) for name in names})


def _check_text(value: Any) -> None:
    if isinstance(value, str) and not value.isprintable():
        raise ValueError("it holds characters that a terminal would obey")
