"""Export a checkpoint: strip, write, and run what was written before it gets its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.torch import save

from pmm_edge import __version__
from pmm_edge.errors import CheckFailedError, PmmError
from pmm_edge.export.onnx_graph import OPSET, onnx_graph
from pmm_edge.export.strip import inference_network
from pmm_edge.files import sha256, written_whole
from pmm_edge.model import Checkpoint, load_checkpoint
from pmm_edge.progress import Report, silent
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.onnx_backend import OnnxEmbedder
from pmm_edge.runtime.torch_backend import CLASSIFIER, TorchEmbedder
from pmm_edge.spec import METADATA_KEY, InputForm, ModelSpec

TOLERANCE = 1e-3
"""How far an export may depart, as a share of the largest embedding value: rounding stays a hundredfold below."""

_STEPS = ("reading the checkpoint", "tracing and writing the graph", "running it against the checkpoint")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    spec: ModelSpec
    size: int
    """Of the file, in bytes."""
    departure: float
    """The largest difference to the checkpoint's embeddings on random images, as a share of their largest value."""


def export_onnx(
    checkpoint_path: Path,
    out: Path,
    form: InputForm = "uint8",
    opset: int = OPSET,
    report: Report = silent,
) -> Exported:
    """Write a checkpoint as one ONNX file, checked against it in ONNX Runtime before it gets its name.

    Args:
        checkpoint_path: of `pmm train`.
        out: a file that ends in `.onnx`.
        form: of the input; see `InputSpec`.

    Raises:
        ModelError: the checkpoint is missing, truncated or not ours.
        OutputError: `out` cannot be written.
        CheckFailedError: the export's embeddings depart from the checkpoint's, or the checkpoint gives NaN.
    """
    _check_name(out, ".onnx")

    def step(number: int) -> None:
        report(f"exporting {out.name}", number, len(_STEPS), (*_STEPS, "done")[number])

    step(0)
    checkpoint = load_checkpoint(checkpoint_path)
    reference = TorchEmbedder(checkpoint.network(), checkpoint.spec, checkpoint_path, "cpu")
    spec = _exported_spec(checkpoint, checkpoint_path, ("torch", "onnx", "onnxscript"))
    spec = replace(spec, input=replace(spec.input, form=form), tools={**spec.tools, "opset": str(opset)})
    with written_whole(out) as temporary:
        step(1)
        model = onnx_graph(inference_network(checkpoint.network(), spec.input), spec, opset)
        temporary.write_bytes(model.SerializeToString())
        step(2)
        departure = _departure(reference, OnnxEmbedder(temporary, "cpu"), out)
    step(3)
    return Exported(out, spec, out.stat().st_size, departure)


def export_safetensors(checkpoint_path: Path, out: Path) -> Exported:
    """Write a checkpoint's weights without classifiers, its spec in the file's metadata, as safetensors.

    Raises:
        ModelError: the checkpoint is missing, truncated or not ours.
        OutputError: `out` cannot be written.
    """
    _check_name(out, ".safetensors")
    checkpoint = load_checkpoint(checkpoint_path)
    spec = _exported_spec(checkpoint, checkpoint_path, ("torch", "safetensors"))
    weights = {name: tensor for name, tensor in checkpoint.weights.items() if CLASSIFIER not in name}
    with written_whole(out) as temporary:
        temporary.write_bytes(save(weights, metadata={METADATA_KEY: spec.to_json()}))
    return Exported(out, spec, out.stat().st_size, departure=0.0)


def _check_name(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise PmmError(
            f"{out} does not end in {suffix}", f"Name it {out.with_suffix(suffix)}: loading goes by the name"
        )


def _exported_spec(checkpoint: Checkpoint, path: Path, tools: tuple[str, ...]) -> ModelSpec:
    versions = {"pmm-edge": __version__} | {tool: version(tool) for tool in tools}
    return replace(checkpoint.spec, checkpoint_sha256=sha256(path), precision="fp32", tools=versions)


def _departure(reference: Embedder, candidate: Embedder, out: Path) -> float:
    """The largest difference on random images, at a batch of one and of several."""
    size = reference.spec.input
    random = np.random.default_rng(0)
    worst = 0.0
    for batch in (1, 3):
        images = random.integers(0, 256, (batch, size.height, size.width, 3), dtype=np.uint8)
        expected, actual = reference.embed_prepared(images), candidate.embed_prepared(images)
        if not np.isfinite(expected).all():
            raise CheckFailedError(f"{reference.path} gives NaN or infinity", "Train again, at a lower learning rate")
        largest = float(np.abs(expected).max()) or 1.0
        departure = float(np.abs(actual - expected).max()) / largest
        if not departure <= TOLERANCE:  # so that NaN fails as well
            raise CheckFailedError(
                f"{out} was not written: at batch {batch} its embeddings depart from those of {reference.path}"
                f" by {departure:.2g} of the largest value, {TOLERANCE:g} is allowed",
                "Another version of torch or onnxscript may export it rightly",
            )
        worst = max(worst, departure)
    return worst
