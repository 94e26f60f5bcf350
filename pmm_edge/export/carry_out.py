"""A plan of `pmm export`, carried out: networks, then engines, then bundles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pmm_edge.errors import PmmError
from pmm_edge.export.bundles import Bundle, deepstream_bundle, triton_bundle
from pmm_edge.export.plan import Asked, Plan, without
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.progress import Report, silent

if TYPE_CHECKING:
    from pmm_edge.export.exporter import Exported


@dataclass(frozen=True)
class Made:
    """What there is now."""

    exported: list[Exported]
    engine: BuiltEngine | None
    """Of the input form that was asked for."""
    served_engine: BuiltEngine | None
    """What Triton serves, where that is another."""
    bundles: list[Bundle]
    failures: list[PmmError]
    """Why engines and bundles are missing. The networks are there all the same."""


def carry_out(asked: Asked, plan: Plan, report: Report = silent) -> Made:
    """Write what was planned. An engine or a bundle that fails does not keep the others from being written.

    Raises:
        ModelError, DataError, OutputError, CheckFailedError: a network cannot be exported; see `export_onnx`.
        PmmError: a package that exporting takes is missing.
    """
    exported = _export(asked, plan, report) if plan.to_export else []
    engines: list[BuiltEngine | None] = []
    bundles: list[Bundle] = []
    failures: list[PmmError] = []
    for engine in plan.engines:
        try:
            engines.append(build_engine(engine.onnx, engine.path, engine.settings, report, engine.also))
        except PmmError as failure:
            failures.append(failure)
            engines.append(None)
    to_write: list[Callable[[], Bundle]] = []
    if plan.deepstream:
        to_write.append(partial(deepstream_bundle, plan.onnx["raw"], plan.deepstream))
    served = next((built for engine, built in zip(plan.engines, engines, strict=True) if engine.served), None)
    if plan.triton and (served or not plan.engines):
        path = served.path if served else None
        to_write.append(partial(triton_bundle, plan.onnx["uint8"], plan.triton.parent, path, plan.triton.name))
    for write in to_write:
        try:
            bundles.append(write())
        except PmmError as failure:
            failures.append(failure)
    main, other = (*engines, None, None)[:2]
    return Made(exported, main, other, bundles, failures)


def _export(asked: Asked, plan: Plan, report: Report) -> list[Exported]:
    """Write the file of each input form, and the weights beside the first."""
    try:
        from pmm_edge.export.exporter import export_forms, export_safetensors
    except ModuleNotFoundError as error:
        raise without(error) from error

    exported = export_forms(asked.source, plan.onnx, asked.graph, asked.precision, report)
    if plan.safetensors:
        exported.insert(1, export_safetensors(asked.source, plan.safetensors))
    return exported
