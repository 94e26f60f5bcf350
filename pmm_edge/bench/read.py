"""Read `bench.json` back, from whoever it comes: every entry is checked, the first wrong one is named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from pmm_edge.bench.figures import QUANTILES, SCHEMA, BenchReport, ModelReport
from pmm_edge.errors import DataError

_LARGEST_FILE = 256 * 2**20
_REMEDY = "Write it again with pmm bench"


class _WrongError(ValueError):
    """An entry that is not what the schema says; the text names it."""


def read_report(path: Path) -> BenchReport:
    """Read what `BenchReport.save` wrote. Entries that this version does not know are left out.

    A figure that was not finite is null in the file and NaN here.

    Raises:
        DataError: the file is missing, no JSON, of another schema, or has an entry that is missing or wrong.
    """
    raw = _json_of(path)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema is None:
        raise DataError(f"{path} is no report of pmm bench: it names no schema", "Name a bench.json of this version")
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema!r:.20}, this version of pmm-edge reads {SCHEMA}", _REMEDY)
    try:
        report: BenchReport = _read(BenchReport, raw, "")
        for model in (report.reference, *report.models):
            _check(model)
    except _WrongError as error:
        raise DataError(f"{path} cannot be read: {error}", _REMEDY) from error
    return report


def _json_of(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} is larger than any report", "Name a bench.json")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Name a bench.json that pmm bench wrote") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error})", "Name a bench.json that pmm bench wrote") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _read(kind: Any, raw: Any, where: str) -> Any:
    """`raw` as the type `kind`, checked all the way down; `where` is its place in the file, for errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # only ever `X | None`
        return None if raw is None else _read(arguments[0], raw, where)
    if origin is Literal:
        if not isinstance(raw, str) or raw not in arguments:
            raise _WrongError(f"{where} is {raw!r:.40}, not one of {', '.join(map(str, arguments))}")
        return raw
    if origin is list:
        return [_read(arguments[0], entry, f"{where}[{n}]") for n, entry in enumerate(_of(list, raw, where))]
    if origin is dict:
        entries: dict[str, Any] = _of(dict, raw, where)
        return {key: _read(arguments[1], value, f"{where}[{key!r:.40}]") for key, value in entries.items()}
    if is_dataclass(kind):
        return _object(kind, _of(dict, raw, where or "the file"), f"{where}." if where else "")
    return _number(raw, where) if kind is float else _of(kind, raw, where)


def _object(kind: Any, raw: Mapping[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    values = {}
    for field in fields(kind):
        if field.name in raw:
            values[field.name] = _read(types[field.name], raw[field.name], where + field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise _WrongError(f"{where}{field.name} is missing")
    return kind(**values)


def _of(kind: type, raw: Any, where: str) -> Any:
    # In Python a bool is an int; in the schema it is not.
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
        raise _WrongError(f"{where} is {raw!r:.40}, not {words[kind]}")
    if isinstance(raw, int) and abs(raw) > 2**63:  # nothing that is counted; float() of it may overflow
        raise _WrongError(f"{where} is larger than anything that is counted")
    return raw


def _number(raw: Any, where: str) -> float:
    if raw is None:
        return math.nan
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise _WrongError(f"{where} is {raw!r:.40}, not a number")
    value = float(_of(int, raw, where)) if isinstance(raw, int) else raw
    if not math.isfinite(value):  # 1e999
        raise _WrongError(f"{where} is larger than any number")
    return value


def _check(model: ModelReport) -> None:
    """What types cannot say and everything that reads a report relies on."""
    if model.parity and len(model.parity.cosine_quantiles) != QUANTILES:
        raise _WrongError(f"cosine_quantiles of {model.path} are {len(model.parity.cosine_quantiles)}, not {QUANTILES}")
    for latency in model.latency:
        if latency.batch < 1 or latency.runs < 1 or not latency.median_ms > 0:
            raise _WrongError(f"a latency of {model.path} has no batch, no runs or no time")
    if model.file_bytes < 0:
        raise _WrongError(f"file_bytes of {model.path} is negative")
