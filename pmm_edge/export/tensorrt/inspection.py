"""Which type each layer of an engine really runs in, read back from the engine and never assumed.

TensorRT's inspector describes layers in JSON. What it tells of their types differs by version and by kernel:
- 10 gives a tensor one field, `Format/Datatype`, either `Half` or prose like `Channel major FP16 format where channel
  % 8 == 0`; 11 has the type alone, in `DataType`. Where the batch is dynamic, 10 may say `N/A due to dynamic shapes`.
- Convolutions from its older library give the type of their `Weights`, and a `TacticName` like
  `sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_...`.
So a layer's type is that of its weights, else the narrowest that it reads, else that it writes, else its tactic's.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pmm_edge.runtime.embedder import INPUT
from pmm_edge.runtime.engine_manifest import PrecisionCount

UNKNOWN = "unknown"

_NARROWEST_FIRST = ("FP4", "INT4", "FP8", "INT8", "FP16", "BF16", "FP32")
_ALIASES = {"HALF": "FP16", "BFLOAT16": "BF16", "FLOAT": "FP32", "TF32": "FP32"}
_TYPE = re.compile(rf"\b({'|'.join((*_NARROWEST_FIRST, *_ALIASES))})\b", re.IGNORECASE)

_TACTICS = {"i8": "INT8", "int8": "INT8", "f16": "FP16", "h": "FP16", "bf16": "BF16", "tf32": "FP32", "f32": "FP32"}
_TACTIC = re.compile(r"(?:^|_)(i8|int8|f16|bf16|tf32|f32|h(?=\d+gemm))", re.IGNORECASE)

_MOVES = {"Reformat", "NoOp", "Shuffle", "Constant", "Identity", "Cast", "Quantize", "Dequantize", "Slice"}
"""Kinds of layer that compute nothing."""
_PRODUCT = re.compile(r"conv(?!ert)|gemm|matmul|matrixmultiply|fullyconnected", re.IGNORECASE)
_GENERATED = "__myl_"
"""Begins the names of kernels that TensorRT generates, which say what they compute; other names are the graph's."""

Layer = Mapping[str, Any]


def count_precision(trt: Any, engine: Any, shape: tuple[int, ...]) -> PrecisionCount:
    """Ask an engine, at one shape of its input, how many of its layers run in which type."""
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None and context.set_input_shape(INPUT, shape):
        inspector.execution_context = context  # with a shape set, types of dynamic tensors are told
    information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return count_layers(json.loads(information).get("Layers", []))


def count_layers(layers: Iterable[Layer | str]) -> PrecisionCount:
    """Count the inspector's layers by type."""
    # A layer of an engine that tells no details is its name alone.
    described: list[Layer] = [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]
    computing = [layer for layer in described if layer.get("LayerType") not in _MOVES]
    return PrecisionCount(
        layers=_counted(computing), products=_counted(layer for layer in computing if _is_product(layer))
    )


def layer_type(layer: Layer) -> str:
    """The type that one layer of the inspector's runs in."""
    weights = layer.get("Weights")
    told = (
        [weights.get("Type")] if isinstance(weights, Mapping) else [],
        [_told_type(tensor) for tensor in layer.get("Inputs", [])],
        [_told_type(tensor) for tensor in layer.get("Outputs", [])],
    )
    for descriptions in told:
        found = {
            _ALIASES.get(name.upper(), name.upper()) for text in descriptions for name in _TYPE.findall(text or "")
        }
        if found:
            return min(found, key=_NARROWEST_FIRST.index)
    tactic = _TACTIC.search(layer.get("TacticName") or "")
    return _TACTICS[tactic.group(1).lower()] if tactic else UNKNOWN


def _told_type(tensor: Layer) -> str | None:
    fields = {name.lower(): value for name, value in tensor.items()}
    return fields.get("datatype") or fields.get("format/datatype")


def _is_product(layer: Layer) -> bool:
    told = [layer.get(field) or "" for field in ("LayerType", "ParameterType", "TacticName")]
    name = layer.get("Name") or ""
    if name.startswith(_GENERATED):
        told.append(name)
    return "Weights" in layer or bool(_PRODUCT.search(" ".join(told)))


def _counted(layers: Iterable[Layer]) -> dict[str, int]:
    return dict(Counter(layer_type(layer) for layer in layers).most_common())
