"""From an ONNX file to TensorRT's network, with errors that name the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.runtime.build_settings import BatchProfile
from pmm_edge.runtime.tensorrt_library import last_error

_DYNAMIC = -1


def parsed_network(trt: Any, builder: Any, logger: Any, onnx_path: Path, batch: BatchProfile) -> Any:
    """Parse an ONNX file into a strongly typed network.

    Raises:
        ModelError: TensorRT does not know what is in it.
        PmmError: the graph has a fixed batch, and the profile is another.
    """
    # TensorRT 11 knows no other kind of network and ignores the flag; 10 needs it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        problems = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
        raise ModelError(
            f"TensorRT {trt.__version__} cannot parse {onnx_path}: {'; '.join(problems) or last_error(logger)}",
            "A newer TensorRT may know the operator; pmm export writes none that 10.3 lacks",
        )
    fixed = network.get_input(0).shape[0]
    if fixed not in (_DYNAMIC, batch.minimum) or (fixed != _DYNAMIC and batch.minimum != batch.maximum):
        raise PmmError(
            f"{onnx_path} has a fixed batch of {fixed}, the batch profile is {batch}",
            f"Build it with --batch {fixed},{fixed},{fixed}",
        )
    return network


def _described(problem: Any) -> str:
    """One parser error: its node's name and operator, and what is wrong with it."""
    text = " ".join(problem.desc().split())
    where = f"{problem.node_operator()} {problem.node_name()}".strip()
    return f"node {where}: {text}" if where else text
