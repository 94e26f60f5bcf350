"""A model of Triton Inference Server's repository: the network, its configuration, a client.

The configuration's fields are those of `ModelConfig` in model_config.proto of
https://github.com/triton-inference-server/common.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pmm_edge.errors import PmmError
from pmm_edge.export.bundles.bundle import Bundle, fill, spec_of
from pmm_edge.files import folder_written_whole
from pmm_edge.runtime.onnx_backend import INPUT, OUTPUT
from pmm_edge.spec import METADATA_KEY, InputForm, ModelSpec

FORM: InputForm = "uint8"
"""A quarter of the bytes over the network, and nothing that a client could normalise wrongly."""
MAX_BATCH = 64
QUEUE_DELAY_US = 2000
"""How long a request may wait for others to share its batch: below what a batch takes, so that it costs little."""

_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}


def triton_bundle(
    onnx: Path, repository: Path, engine: Path | None = None, batches: tuple[int, int] = (16, MAX_BATCH)
) -> Bundle:
    """Write `repository/<architecture>_<backbone>/`, whole or not at all; other models there are left alone.

    Args:
        onnx: an export with the input form `uint8`.
        engine: the TensorRT engine that was built from it, which is then served in its place.
        batches: the preferred and the largest batch; of an engine those of its profile.

    Raises:
        ModelError: the file is missing, truncated or not ours, or has another input form.
        OutputError: the repository holds a model of that name, or cannot be written.
        PmmError: the engine does not exist, or not 1 <= preferred <= largest batch.
    """
    spec = spec_of(onnx, FORM)
    if engine and not engine.is_file():
        raise PmmError(f"{engine} does not exist", "Build it with pmm export --trt")
    name = f"{spec.architecture}_{spec.backbone}"
    folder = repository / name
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
