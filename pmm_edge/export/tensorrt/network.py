"""From an ONNX file to TensorRT's network, with errors that name the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmm_edge.errors import ModelError
from pmm_edge.runtime.tensorrt_library import last_error


def parsed_network(trt: Any, builder: Any, logger: Any, onnx_path: Path) -> Any:
    """Parse an ONNX file into a strongly typed network.

    Raises:
        ModelError: TensorRT does not know what is in it.
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
    return network


def _described(problem: Any) -> str:
    """One parser error: its node's name and operator, and what is wrong with it."""
    text = " ".join(problem.desc().split())
    where = f"{problem.node_operator()} {problem.node_name()}".strip()
    return f"node {where}: {text}" if where else text
