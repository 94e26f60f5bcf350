"""The smallest network with our spec, for tests of what is around it."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.spec import METADATA_KEY, InputForm, InputSpec, ModelSpec

HEIGHT, WIDTH = 96, 64


def colour_network(path: Path, form: InputForm = "uint8", batch: int | str = "batch") -> Path:
    """Write the smallest ONNX file with our spec: the mean colour of a crop, times a matrix."""
    size = InputSpec(HEIGHT, WIDTH, form)
    spec = ModelSpec("baseline", "none", 4, size, embedding_size=8, stages={"global": (0, 8)})
    fed = TensorProto.UINT8 if form == "uint8" else TensorProto.FLOAT
    spatial = [1, 2] if form == "uint8" else [2, 3]
    matrix = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [INPUT], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["pixels", "spatial"], ["colour"], keepdims=0),
            helper.make_node("MatMul", ["colour", "matrix"], [OUTPUT]),
        ],
        "colour",
        [helper.make_tensor_value_info(INPUT, fed, [batch, *size.shape(1)[1:]])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, 8])],
        [numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(np.array(spatial), "spatial")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path
