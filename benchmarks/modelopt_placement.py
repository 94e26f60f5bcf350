"""Q/DQ placement for TensorRT next to that of NVIDIA's quantizer, nvidia-modelopt, on the same FP32 ONNX file.

    python benchmarks/modelopt_placement.py runs/20261127-124333-quick
    python benchmarks/modelopt_placement.py RUN --modelopt-python /path/to/venv/bin/python

Both calibrate on the same crops, with extremes and with entropy. Cosines (to FP32) and mAP are those of query and
gallery of the run's data set, in ONNX Runtime. Without --modelopt-python, the script installs modelopt into a virtual
environment in the cache folder: its versions of onnx and onnxruntime differ from those of pmm-edge.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from machine import machine

from pmm_edge.data.dataset import read
from pmm_edge.export import export
from pmm_edge.export.exporter import INT8_OPSET
from pmm_edge.export.graph import finalize, split
from pmm_edge.export.quantize import MAX_IMAGES_TENSORRT, quantize, read_calibration, value_ranges
from pmm_edge.files import cache_folder
from pmm_edge.images import network_input
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runs import data_of, resolve_checkpoint
from pmm_edge.runtime import load
from pmm_edge.runtime.embed_files import embed_dataset, evaluate_dataset
from pmm_edge.spec import CalibrationMethod, Quantization

PACKAGE = "nvidia-modelopt[onnx]==0.47.0"
METHODS: dict[CalibrationMethod, str] = {"minmax": "max", "entropy": "entropy"}
"""Ours -> modelopt's name."""
SCRIPT = """
import sys, numpy, modelopt.onnx.quantization as quantization
source, crops, out, method, shape = sys.argv[1:]
quantization.quantize(source, "int8", numpy.load(crops), method, output_path=out, calibration_eps=["cpu"],
                      calibration_shapes=f"images:{shape}", high_precision_dtype="fp16", log_level="WARNING")
"""


def modelopt_python() -> Path:
    """Return the interpreter of an environment with modelopt, which is made on first use."""
    folder = cache_folder() / "modelopt"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    return python


def int8_inputs(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> its inputs that come from a DequantizeLinear, as `input 1, weights`."""
    producer = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        quantized = []
        for number, name in enumerate(node.input):
            while (source := producer.get(name)) is not None and source.op_type == "Cast":
                name = source.input[0]
            if source is not None and source.op_type == "DequantizeLinear":
                is_layer = node.op_type in ("Conv", "Gemm")
                quantized.append(("input", "weights", "bias")[number] if is_layer else f"input {number + 1}")
        found[node.name] = ", ".join(quantized)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--modelopt-python", type=Path, metavar="PATH", help="interpreter that imports modelopt")
    arguments = parser.parse_args()
    checkpoint = resolve_checkpoint(arguments.run)
    data, layout = data_of(checkpoint)
    python = arguments.modelopt_python or modelopt_python()
    dataset = read(data, layout).without_junk()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "fp32.onnx"
        spec = export(checkpoint, out=source, input_form="normalized", opset=INT8_OPSET).files[0].spec
        parts = split(onnx.load(source))
        crops = read_calibration(dataset.root, spec.input, layout, most=MAX_IMAGES_TENSORRT).ranges
        np.save(folder / "crops.npy", network_input(crops, spec.input))
        models = {"FP32": onnx.load(source)}
        for method, theirs in METHODS.items():
            ranges = value_ranges(parts.network, crops, spec.input, method, "tensorrt")
            models[f"pmm-edge, {method}"] = parts.join(quantize(parts.network, ranges, "tensorrt"))
            out, shape = folder / f"{theirs}.onnx", "x".join(map(str, spec.input.shape(1)))
            command = [python, "-c", SCRIPT, source, folder / "crops.npy", out, theirs, shape]
            subprocess.run(command, check=True, stdout=sys.stderr)
            models[f"modelopt, {theirs}"] = onnx.load(out)

        print(machine("onnxruntime-gpu", "onnxruntime", "onnx"), f"{PACKAGE}, {len(crops)} calibration crops", sep="\n")
        tables = [int8_inputs(models[name]) for name in ("pmm-edge, minmax", "modelopt, max")]
        print("\n| node | operator | pmm-edge | modelopt |\n| --- | --- | --- | --- |")
        for node in models["FP32"].graph.node:
            values = [table.get(node.name, "removed") for table in tables]
            if node.op_type in ("Conv", "Gemm", "Add") or any(values):
                print(f"| {node.name} | {node.op_type} | {' | '.join(value or '–' for value in values)} |")

        print("\n| INT8 | MB | smallest cosine | mean cosine | mAP, % |\n| --- | --- | --- | --- | --- |")
        expected = None
        for name, model in models.items():
            path = folder / f"{name}.onnx"
            quantization = None if name == "FP32" else Quantization("tensorrt", "minmax", len(crops), float_type="fp16")
            described = replace(spec, precision="int8" if quantization else "fp32", quantization=quantization)
            onnx.save(finalize(model, described), path)
            embeddings = embed_dataset(load(path, "cpu"), dataset).embeddings
            expected = embeddings if expected is None else expected
            cosine, mean_ap = cosines(expected, embeddings), evaluate_dataset(dataset, embeddings).mAP
            closeness = f"{cosine.min():.6f} | {cosine.mean():.6f}"
            print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {closeness} | {100 * mean_ap:.2f} |", flush=True)


if __name__ == "__main__":
    main()
