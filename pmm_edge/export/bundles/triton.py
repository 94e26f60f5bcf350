"""A model of Triton Inference Server's repository: the network, its configuration, a client.

The configuration's fields are those of `ModelConfig` in model_config.proto of
https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.export.bundles.bundle import Bundle, fill, spec_of
from pmm_edge.export.tensorrt import check_quantised_for_tensorrt
from pmm_edge.files import check_new_folder, folder_written_whole, sha256
from pmm_edge.runtime.embedder import INPUT, OUTPUT
from pmm_edge.runtime.manifest import BatchProfile, check_files, read_manifest
from pmm_edge.spec import METADATA_KEY, InputForm, ModelSpec

FORM: InputForm = "uint8"
"""A quarter of the bytes over the network, and nothing that a client could normalise wrongly."""
PREFERRED_BATCH, MAX_BATCH = 16, 64
TAKEN = "Give the model another name with --triton-name"
QUEUE_DELAY_US = 2000
"""How long a request may wait for others to share its batch: below what a batch takes, so that it costs little."""

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def triton_bundle(onnx: Path, repository: Path, engine: Path | None = None, name: str | None = None) -> Bundle:
    """Write `repository/name/`, whole or not at all; other models there are left alone.

    Args:
        onnx: an export with the input form `uint8`.
        engine: the TensorRT engine that was built from it, its manifest beside it, which is then served in its place.
        name: of the model, as clients ask for it; None for `model_name`'s.

    Raises:
        ModelError: the file is missing, truncated or not ours, has another input form or a static batch; the engine or
            its manifest is missing, or was not built from this file, or takes no batch of 1.
        OutputError: the repository holds a model of that name, or cannot be written.
        PmmError: the name is none for a folder.
    """
    spec = spec_of(onnx, FORM)
    batches = (PREFERRED_BATCH, MAX_BATCH)
    if engine:
        check_quantised_for_tensorrt(spec, onnx)
        profile = _profile_of(engine, onnx, spec)
        batches = (profile.optimal, profile.maximum)
    name = checked_name(name) if name else model_name(spec, engine is not None)
    folder = repository / name
    check_new_folder(folder, TAKEN)
    platform, file = ("tensorrt_plan", "model.plan") if engine else ("onnxruntime_onnx", "model.onnx")
    config = model_config(spec, name, platform, batches)
    with folder_written_whole(folder) as temporary:
        (temporary / "1").mkdir()
        shutil.copyfile(engine or onnx, temporary / "1" / file)
        (temporary / "config.pbtxt").write_text(config, encoding="utf-8")
        values = {
            "name": name,
            "file": file,
            "height": spec.input.height,
            "width": spec.input.width,
            "size": spec.embedding_size,
            "input": INPUT,
            "output": OUTPUT,
            "largest": batches[1],
        }
        (temporary / "client.py").write_text(fill("triton_client.py.txt", **values), encoding="utf-8")
        (temporary / "README.md").write_text(fill("triton_readme.md", **values), encoding="utf-8")
    return Bundle("triton", folder, spec)


def model_name(spec: ModelSpec, as_engine: bool) -> str:
    """A name that says what clients choose by, like `pmm_resnet50`, `pmm_resnet50_fp16_trt`, `pmm_resnet50_int8_cpu`.

    Args:
        as_engine: TensorRT serves it.
    """
    words = [spec.architecture, spec.backbone]
    if spec.precision != "fp32":
        words.append(spec.precision)
    if spec.quantization and spec.quantization.target == "cpu":
        words.append("cpu")
    return "_".join([*words, "trt"] if as_engine else words)


def checked_name(name: str) -> str:
    """The name itself.

    Raises:
        PmmError: it is none for a folder, or none that a configuration can hold as it is.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise PmmError(f"'{name}' is no name for a model", "Take letters, digits, _, . and -")
    return name


def check_least_batch(batch: BatchProfile) -> None:
    """Refuse an engine that takes no single crop: Triton fills no batch up.

    Raises:
        PmmError: the least batch is more than 1.
    """
    if batch.minimum != 1:
        raise PmmError(
            f"an engine for batches of {batch.minimum} and more cannot answer a lone request in Triton",
            f"Build it with --batch {replace(batch, minimum=1)}",
        )


def _profile_of(engine: Path, onnx: Path, spec: ModelSpec) -> BatchProfile:
    """The batches of an engine that was built from this very file."""
    manifest = read_manifest(engine)
    check_files(manifest, engine)
    if (manifest.spec, manifest.onnx_sha256) != (spec, sha256(onnx)):
        raise ModelError(
            f"{engine} was not built from {onnx}, which is to describe it",
            f"Build it: {manifest.settings.command(onnx, engine)}",
        )
    check_least_batch(manifest.settings.batch)
    return manifest.settings.batch


def model_config(spec: ModelSpec, name: str, platform: str, batches: tuple[int, int]) -> str:
    """The text of config.pbtxt.

    Args:
        platform: `onnxruntime_onnx` or `tensorrt_plan`.
        batches: the preferred and the largest batch.

    Raises:
        PmmError: not 1 <= preferred <= largest batch.
    """
    preferred, largest = batches
    if not 1 <= preferred <= largest:
        raise PmmError(
            f"a preferred batch of {preferred} does not fit a largest of {largest}", "Give 1 <= preferred <= largest"
        )
    return fill(
        "triton_config.pbtxt",
        name=name,
        platform=platform,
        input=INPUT,
        input_type=_TYPES[spec.input.dtype],
        input_dims=list(spec.input.shape(1)[1:]),
        output=OUTPUT,
        output_dims=[spec.embedding_size],
        largest=largest,
        preferred=sorted({preferred, largest}),
        delay=QUEUE_DELAY_US,
        key=METADATA_KEY,
        spec=json.dumps(spec.to_json()),
    )
