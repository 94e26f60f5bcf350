"""Deployment folders: a ReID configuration for DeepStream's tracker, a model for Triton Inference Server.

Keys of the tracker are from "Gst-nvtracker" in NVIDIA's DeepStream 7.0 developer guide, Triton's fields from
model_config.proto of https://github.com/triton-inference-server/common.
"""

import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template

from pmm_edge.console import percent, printable
from pmm_edge.export.tensorrt import BuiltEngine
from pmm_edge.files import folder_written_whole
from pmm_edge.runtime.certificate import open_model
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import METADATA_KEY, Distance, InputForm, ModelSpec, describe_precision

DEEPSTREAM_FORM: InputForm = "raw"
"""The tracker feeds floats with one scale for all channels, so it cannot normalize with ImageNet's three."""
TRITON_FORM: InputForm = "uint8"
"""A quarter of the traffic of floats, and no client can normalize wrongly."""


def deepstream_bundle(onnx: Path, folder: Path) -> None:
    """Write a folder for DeepStream's tracker: network, complete NvDCF configuration, `ReID:` section, README.

    `onnx` is an export with the input form `raw`. `folder` must be new or empty and is written atomically.
    """
    file, batch = open_model(onnx), 100
    spec = OnnxEmbedder(file, "cpu").spec
    section = _fill(
        "deepstream_reid.yml",
        spec,
        engine=f"reid.onnx_b{batch}_gpu0_{spec.precision}.engine",
        batch=batch,
        network_mode=("fp32", "fp16", "int8").index(spec.precision),
    )
    with folder_written_whole(folder) as temporary:
        (temporary / "reid.onnx").write_bytes(file.content)
        for name, text in (
            ("reid_section.yml", section),
            ("config_tracker_NvDCF.yml", _fill("deepstream_nvdcf.yml", spec, reid=section)),
            ("README.md", _fill("deepstream_readme.md", spec, batch=batch)),
        ):
            (temporary / name).write_text(text, encoding="utf-8")


def triton_bundle(onnx: Path, folder: Path, engine: BuiltEngine | None = None) -> None:
    """Write a model into the folder of its name in a repository: network, config.pbtxt, client and README.

    `onnx` is an export with the input form `uint8`, `engine` was built from it and is served instead. `folder` must be
    new or empty and is written atomically.
    """
    network = open_model(onnx)
    spec = OnnxEmbedder(network, "cpu").spec
    batch = engine.manifest.settings.batch if engine else BatchProfile()
    platform, file = ("tensorrt_plan", "model.plan") if engine else ("onnxruntime_onnx", "model.onnx")
    with folder_written_whole(folder) as temporary:
        (temporary / "1").mkdir()
        (temporary / "1" / file).write_bytes(engine.path.read_bytes() if engine else network.content)
        for name, template in (
            ("config.pbtxt", "triton_config.pbtxt"),
            ("client.py", "triton_client.py.txt"),
            ("README.md", "triton_readme.md"),
        ):
            text = _fill(
                template,
                spec,
                name=folder.name,
                platform=platform,
                file=file,
                largest=batch.maximum,
                preferred=sorted({batch.optimal, batch.maximum}),
                key=METADATA_KEY,
                spec_json=json.dumps(spec.to_json()),  # escapes the same characters as protobuf's text format
            )
            (temporary / name).write_text(text, encoding="utf-8")


def triton_name(spec: ModelSpec, as_engine: bool) -> str:
    """Return a model name such as `pmm_resnet50`, `pmm_resnet50_fp16_trt` (an engine) or `pmm_resnet50_int8_cpu`."""
    for_cpu = spec.quantization is not None and spec.quantization.target == "cpu"
    words = [spec.architecture, spec.backbone, *[spec.precision] * (spec.precision != "fp32")]
    return "_".join([*words, *["cpu"] * for_cpu, *["trt"] * as_engine])


def _figures(spec: ModelSpec, distance: Distance) -> str:
    """Describe the checkpoint's retrieval by a distance, on one line."""
    found = spec.retrieval_cosine if distance == "cosine" else spec.retrieval
    if found is None:
        return f"not measured; `pmm eval MODEL DATA --distance {distance}` measures it"
    return printable(f"mAP {percent(found.mAP)} %, Rank-1 {percent(found.rank1)} % on {spec.dataset}")


def _thresholds(spec: ModelSpec, *distances: Distance) -> str:
    """Describe the decision thresholds by these distances as a table."""
    if spec.calibration is None:
        return "The network has no decision thresholds: run `pmm calibrate CHECKPOINT DATA` and export it again."
    found = spec.calibration
    people = f"{found.identities:,} people of {printable(found.dataset)}"
    rows = ["| distance | at most | false-match rate | true-match rate |", "| --- | --- | --- | --- |"]
    for name in distances:
        for one in (found.cosine if name == "cosine" else found.euclidean).thresholds:
            rows.append(f"| {name} | {one.distance:.4g} | {one.fmr:g} | {percent(one.tmr)} % |")
    return "\n".join([f"Two images show the same person up to these distances, measured on {people}:", "", *rows])


def _smallest_cosine(spec: ModelSpec) -> float:
    """The cosine from which two tracks can be the same person: at a false-match rate of 0.001, or the nearest one.

    Without thresholds it is the default of DeepStream, which says nothing about the network.
    """
    found = spec.calibration.cosine.thresholds if spec.calibration else ()
    if not found:
        return 0.8
    distance = min(found, key=lambda one: abs(one.fmr - 1e-3)).distance
    return max(0.0, math.ceil(1e4 * (1 - distance)) / 1e4)


def _fill(template: str, spec: ModelSpec, **values: object) -> str:
    """Fill in a file of `templates/`: `$name` is a value, `$$` a dollar sign."""
    text = (files("pmm_edge.export") / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(
        architecture=spec.architecture,
        backbone=spec.backbone,
        height=spec.input.height,
        width=spec.input.width,
        resize=spec.input.resize,
        dims=list(spec.input.shape(1)[1:]),
        size=spec.embedding_size,
        precision=describe_precision(spec),
        input=INPUT,
        output=OUTPUT,
        by_euclidean=_figures(spec, "euclidean"),
        by_cosine=_figures(spec, "cosine"),
        thresholds_cosine=_thresholds(spec, "cosine"),
        thresholds=_thresholds(spec, "euclidean", "cosine"),
        smallest_cosine=_smallest_cosine(spec),
        length="have unit length already and do not change" if spec.normalized_output else "are longer",
        **values,
    )
