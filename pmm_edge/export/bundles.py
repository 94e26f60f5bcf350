"""Deployment folders: a ReID configuration for DeepStream's tracker, a model for Triton Inference Server.

Keys of the tracker are from "Gst-nvtracker" in NVIDIA's DeepStream 7.0 developer guide, Triton's fields from
model_config.proto of https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.export.tensorrt import check_quantized_for_tensorrt
from pmm_edge.files import check_new_folder, folder_written_whole, sha256
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.runtime.manifest import BatchProfile, check_files, read_manifest
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import METADATA_KEY, InputForm, ModelSpec

DEEPSTREAM_FORM: InputForm = "raw"
"""The tracker feeds floats with one scale for all channels, so it cannot normalize with ImageNet's three."""
TRITON_FORM: InputForm = "uint8"
"""A quarter of the traffic of floats, and no client can normalize wrongly."""

TRACKER_BATCH = 100
PREFERRED_BATCH, MAX_BATCH = 16, 64
QUEUE_DELAY_US = 2000
"""How long Triton holds a request to batch it with others: less than a batch takes."""
NAME_TAKEN = "Give the model another name with --triton-name"


@dataclass(frozen=True)
class Bundle:
    """A deployment folder; all values in its files follow from the spec of the model in it."""

    kind: Literal["deepstream", "triton"]
    folder: Path
    spec: ModelSpec


def deepstream_bundle(onnx: Path, folder: Path) -> Bundle:
    """Write a folder for DeepStream's tracker: network, complete NvDCF configuration, `ReID:` section, README.

    `onnx` is an export with the input form `raw`. `folder` must be new or empty and is written atomically.
    """
    spec = _load_spec(onnx, DEEPSTREAM_FORM)
    check_quantized_for_tensorrt(spec, onnx)
    section = reid_section(spec)
    with folder_written_whole(folder) as temporary:
        shutil.copyfile(onnx, temporary / "reid.onnx")
        for name, text in (
            ("reid_section.yml", section),
            ("config_tracker_NvDCF.yml", _fill("deepstream_nvdcf.yml", spec, reid=section)),
            ("README.md", _fill("deepstream_readme.md", spec, batch=TRACKER_BATCH)),
        ):
            (temporary / name).write_text(text, encoding="utf-8")
    return Bundle("deepstream", folder, spec)


def reid_section(spec: ModelSpec) -> str:
    """Return the `ReID:` section of the tracker's YAML."""
    return _fill(
        "deepstream_reid.yml",
        spec,
        engine=f"reid.onnx_b{TRACKER_BATCH}_gpu0_{spec.precision}.engine",
        batch=TRACKER_BATCH,
        network_mode=("fp32", "fp16", "int8").index(spec.precision),
        input_order=("NCHW", "NHWC").index(spec.input.layout),
    )


def triton_bundle(onnx: Path, repository: Path, engine: Path | None = None, name: str | None = None) -> Bundle:
    """Write `repository/name/`: network, config.pbtxt, client and README. Other models there are left alone.

    `onnx` is an export with the input form `uint8`, `engine` a TensorRT engine built from it to serve instead, `name`
    what clients call the model. Raises ModelError if a file does not suit Triton or the engine is of another file,
    OutputError if the name is taken, PmmError if it is invalid or the engine does not take a batch of 1.
    """
    spec = _load_spec(onnx, TRITON_FORM)
    batches = (PREFERRED_BATCH, MAX_BATCH)
    if engine:
        check_quantized_for_tensorrt(spec, onnx)
        manifest = read_manifest(engine)
        check_files(manifest, engine)
        if (manifest.spec, manifest.onnx_sha256) != (spec, sha256(onnx)):
            command = manifest.settings.command(onnx, engine)
            raise ModelError(f"{engine} was not built from {onnx}", f"Build it: {command}")
        check_batch_of_one(manifest.settings.batch)
        batches = (manifest.settings.batch.optimal, manifest.settings.batch.maximum)
    name = check_triton_name(name) if name else triton_name(spec, engine is not None)
    folder = repository / name
    check_new_folder(folder, NAME_TAKEN)
    platform, file = ("tensorrt_plan", "model.plan") if engine else ("onnxruntime_onnx", "model.onnx")
    with folder_written_whole(folder) as temporary:
        (temporary / "1").mkdir()
        shutil.copyfile(engine or onnx, temporary / "1" / file)
        for path, text in (
            ("config.pbtxt", triton_config(spec, name, platform, batches)),
            ("client.py", _fill("triton_client.py.txt", spec, name=name, largest=batches[1])),
            ("README.md", _fill("triton_readme.md", spec, name=name, largest=batches[1], file=file)),
        ):
            (temporary / path).write_text(text, encoding="utf-8")
    return Bundle("triton", folder, spec)


def triton_config(spec: ModelSpec, name: str, platform: str, batches: tuple[int, int]) -> str:
    """Return the text of config.pbtxt; `batches` are the preferred and the maximum batch size."""
    return _fill(
        "triton_config.pbtxt",
        spec,
        name=name,
        platform=platform,
        input_type={"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}[spec.input.dtype],
        largest=batches[1],
        preferred=sorted(set(batches)),
        delay=QUEUE_DELAY_US,
        key=METADATA_KEY,
        spec_json=json.dumps(spec.to_json()),  # escapes the same characters as protobuf's text format
    )


def triton_name(spec: ModelSpec, as_engine: bool) -> str:
    """Return a model name such as `pmm_resnet50`, `pmm_resnet50_fp16_trt` (an engine) or `pmm_resnet50_int8_cpu`."""
    words = [spec.architecture, spec.backbone]
    if spec.precision != "fp32":
        words.append(spec.precision)
    if spec.quantization and spec.quantization.target == "cpu":
        words.append("cpu")
    return "_".join([*words, "trt"] if as_engine else words)


def check_triton_name(name: str) -> str:
    """Return the name, or raise PmmError if it is not valid for a folder and in config.pbtxt."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise PmmError(f"'{name}' is not a valid model name", "Use letters, digits, _, . and -")
    return name


def check_accepts(spec: ModelSpec, static_batch: int | None, onnx: Path, form: InputForm) -> None:
    """Raise ModelError unless a network accepts what DeepStream or Triton feeds: one input form, any batch size."""
    if spec.input.form != form:
        raise ModelError(
            f"{onnx} has the input form {spec.input.form}, but the bundle needs {form}",
            f"Export it with --input-form {form}",
        )
    if static_batch is not None:
        raise ModelError(
            f"{onnx} has a static batch of {static_batch}, but DeepStream and Triton use any batch size",
            "Export it without --static-batch",
        )


def check_batch_of_one(profile: BatchProfile) -> None:
    """Raise PmmError unless an engine can serve a single crop: Triton does not pad batches."""
    if profile.minimum != 1:
        raise PmmError(
            f"Triton sends single requests, but the smallest batch of the engine is {profile.minimum}",
            f"Build it with --batch-profile {replace(profile, minimum=1)}",
        )


def _load_spec(onnx: Path, form: InputForm) -> ModelSpec:
    network = OnnxEmbedder(onnx, "cpu")
    check_accepts(network.spec, network.profile.maximum if network.profile else None, onnx, form)
    return network.spec


def _fill(template: str, spec: ModelSpec, **values: object) -> str:
    """Fill in a file of `templates/`: `$name` is a value, `$$` a dollar sign."""
    text = (files("pmm_edge.export") / "templates" / template).read_text(encoding="utf-8")
    common = {
        "architecture": spec.architecture,
        "backbone": spec.backbone,
        "height": spec.input.height,
        "width": spec.input.width,
        "resize": spec.input.resize,
        "dims": list(spec.input.shape(1)[1:]),
        "size": spec.embedding_size,
        "precision": spec.precision,
        "input": INPUT,
        "output": OUTPUT,
        "length": "have unit length already and do not change" if spec.normalized_output else "are longer",
    }
    return Template(text).substitute(common | values)
