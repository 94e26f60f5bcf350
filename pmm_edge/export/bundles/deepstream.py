"""A folder for DeepStream's tracker: the network, its `ReID:` section, a complete NvDCF configuration.

Names, ranges and defaults of the keys are those of the parameter tables in "Gst-nvtracker" of NVIDIA's DeepStream 7.0
developer guide; the values of reidType and visualTrackerType are also those of the 9.2 API reference.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pmm_edge.errors import ModelError
from pmm_edge.export.bundles.bundle import Bundle, fill, spec_of
from pmm_edge.export.tensorrt import check_quantised_for_tensorrt
from pmm_edge.files import folder_written_whole
from pmm_edge.spec import InputForm, ModelSpec

FORM: InputForm = "raw"
"""The tracker writes floats and scales them all by one number: ImageNet's three cannot be said to it."""
MODEL, TRACKER, SECTION = "reid.onnx", "config_tracker_NvDCF.yml", "reid_section.yml"

NETWORK_MODES = {"fp32": 0, "fp16": 1, "int8": 2}
_INPUT_ORDERS = {"NCHW": 0, "NHWC": 1}
_COLOR_FORMATS = {"RGB": 0, "BGR": 1}
_BATCH = 100
_LENGTHS = {False: "are longer", True: "have it already, and this leaves them as they are"}
"""What can be said of the embeddings beside vectors of length 1."""


def deepstream_bundle(onnx: Path, folder: Path) -> Bundle:
    """Write a folder that DeepStream's tracker takes, whole or not at all.

    Args:
        onnx: an export with the input form `raw`.
        folder: does not exist yet, or is empty.

    Raises:
        ModelError: the file is missing, truncated or not ours, has another input form or a static batch, or is INT8 for
            CPUs.
        OutputError: the folder has something in it or cannot be written.
    """
    spec = spec_of(onnx, FORM)
    check_quantised_for_tensorrt(spec, onnx)
    section = reid_section(spec)
    with folder_written_whole(folder) as temporary:
        shutil.copyfile(onnx, temporary / MODEL)
        (temporary / SECTION).write_text(section, encoding="utf-8")
        (temporary / TRACKER).write_text(fill("deepstream_nvdcf.yml", reid=section), encoding="utf-8")
        readme = fill(
            "deepstream_readme.md",
            architecture=spec.architecture,
            backbone=spec.backbone,
            height=spec.input.height,
            width=spec.input.width,
            size=spec.embedding_size,
            precision=spec.precision,
            batch=_BATCH,
            length=_LENGTHS[spec.normalized_output],
        )
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return Bundle("deepstream", folder, spec)


def reid_section(spec: ModelSpec) -> str:
    """The `ReID:` section of the tracker's YAML; every value that describes the network follows from its spec.

    Raises:
        ModelError: the tracker has no mode for the network's precision.
    """
    if spec.precision not in NETWORK_MODES:
        raise ModelError(
            f"DeepStream's tracker has no network mode for precision {spec.precision}",
            f"Export it with one of {', '.join(NETWORK_MODES)}",
        )
    return fill(
        "deepstream_reid.yml",
        model=MODEL,
        engine=f"{MODEL}_b{_BATCH}_gpu0_{spec.precision}.engine",
        batch=_BATCH,
        feature_size=spec.embedding_size,
        infer_dims=list(spec.input.shape(1)[1:]),
        network_mode=NETWORK_MODES[spec.precision],
        input_order=_INPUT_ORDERS[spec.input.layout],
        color_format=_COLOR_FORMATS[spec.input.color],
        resize=spec.input.resize,
        length=_LENGTHS[spec.normalized_output],
    )
