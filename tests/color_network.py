"""The smallest network with a spec, for tests of everything around a network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.spec import METADATA_KEY, InputForm, InputSpec, ModelSpec

HEIGHT, WIDTH = 96, 64


def color_network(path: Path, form: InputForm = "uint8", batch: int | str = "batch", **changes: object) -> Path:
    """Write a network that multiplies the mean color by a (3, 8) matrix; `changes` are fields of its spec."""
    size = InputSpec(HEIGHT, WIDTH, form)
    spec = ModelSpec("baseline", "none", 4, size, embedding_size=8, stages={"global": (0, 8)})
    kind = TensorProto.UINT8 if form == "uint8" else TensorProto.FLOAT
    spatial = [1, 2] if form == "uint8" else [2, 3]
    matrix = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "spatial"], ["color"], keepdims=0),
            helper.make_node("MatMul", ["color", "matrix"], [OUTPUT]),
        ],
        "color",
        [helper.make_tensor_value_info(INPUT, kind, [batch, *size.shape(1)[1:]])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, 8])],
        [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(np.array(spatial), "spatial")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: replace(spec, **changes).to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
