"""One Embedder over every engine. Each engine is imported when the first file needs it."""

from __future__ import annotations

from pathlib import Path

from pmm_edge.errors import ModelError, install
from pmm_edge.runs import resolve_checkpoint
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

__all__ = ["Embedder", "embed_files", "load"]

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".safetensors"})


def load(path: str | Path, device: str | int | None = None, require_certificate: bool = False) -> Embedder:
    """Load a network.

        embedder = pmm_edge.load("model.onnx")
        embeddings = embedder.embed(crops)      # a list of (H, W, 3) uint8 RGB arrays -> (N, D) float32

    Args:
        path: `.onnx` runs in ONNX Runtime, `.engine` in TensorRT, a checkpoint `.pt`, `.safetensors` or a run folder
            (for its `best.pt`) in PyTorch.
        device: `cpu`, `cuda`, `cuda:N` or the index of a GPU. By default a GPU if the engine can use one, otherwise the
            CPU; a `PmmWarning` says when ONNX Runtime cannot use an existing GPU. For `.onnx` also `tensorrt` or
            `tensorrt:N`, the TensorRT provider of ONNX Runtime, whose first run builds an engine for minutes.
        require_certificate: refuse a model without a valid certificate of `pmm bench`, before any of it runs.

    Raises ModelError if the file is missing or damaged or its device is not available, CertificateError if the
    certificate is missing or does not match, NotOnThisMachineError or GpuError if an `.engine` cannot run here.
    """
    path = Path(path)
    if path.is_dir():
        path = resolve_checkpoint(path)
    if not require_certificate:
        return _load(path, device)
    from pmm_edge.runtime.certificate import CertificateError, check_certificate, read_certified

    certificate, content = read_certified(path)
    embedder = _load(path, device, content)
    if path.suffix in TORCH_SUFFIXES:
        check_certificate(path)  # torch reads the file itself; it holds data, not code, so checking again is enough
    if embedder.spec != certificate.spec:
        raise CertificateError(f"the certificate of {path} has another spec than the model", "Run pmm bench again")
    return embedder


def _load(path: Path, device: str | int | None, content: bytes | None = None) -> Embedder:
    """Load a file; an ONNX file or engine from `content` if it was read already."""
    if path.suffix == ".onnx":
        from pmm_edge.runtime.onnx_backend import OnnxEmbedder

        return OnnxEmbedder(path, device, content)
    if path.suffix == ".engine":
        from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

        return TensorRTEmbedder(path, device, content=content)
    if path.suffix not in TORCH_SUFFIXES:
        raise ModelError(
            f"cannot load {path}: unknown suffix", "Name a .onnx, .engine, .pt or .safetensors file made by pmm-edge"
        )
    try:
        from pmm_edge.runtime.torch_backend import load_torch
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{path} requires {error.name}, which is not installed",
            f"{install('train')}, or load the .onnx file that pmm export writes",
        ) from error
    return load_torch(path, device)
