"""What all bundles share: a model that is checked before it is copied, and templates filled from its spec."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from pmm_edge.errors import ModelError
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.spec import InputForm, ModelSpec

_TEMPLATES = files("pmm_edge.export.bundles") / "templates"


@dataclass(frozen=True)
class Bundle:
    """A folder that was written whole."""

    kind: str
    """`deepstream` or `triton`."""
    folder: Path
    spec: ModelSpec
    """Of the model in it; every value in the folder's files follows from it."""


def fill(template: str, **values: object) -> str:
    """Fill in a file of `templates/`; `$name` stands for a value, `$$` for a dollar sign."""
    return Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def spec_of(onnx: Path, form: InputForm) -> ModelSpec:
    """The spec of an exported model that runs and takes what a bundle feeds.

    Raises:
        ModelError: the file is missing, truncated or not ours, takes another form, or only one batch size.
    """
    network = OnnxEmbedder(onnx, "cpu")
    check_feeding(network.spec, network.profile.maximum if network.profile else None, onnx, form)
    return network.spec


def check_feeding(spec: ModelSpec, static_batch: int | None, onnx: Path, form: InputForm) -> None:
    """Hold a network against what DeepStream and Triton feed it: one input form, and as many crops as there are.

    Raises:
        ModelError: it takes another form, or only one batch size.
    """
    if spec.input.form != form:
        raise ModelError(
            f"{onnx} takes input of the form {spec.input.form}, the bundle feeds {form}",
            f"Export it with --input {form}",
        )
    if static_batch is not None:
        raise ModelError(
            f"{onnx} takes batches of {static_batch} alone, and neither DeepStream nor Triton fills them up",
            "Export it without --static-batch",
        )
