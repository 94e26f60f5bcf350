"""One Embedder over every engine. Importing this imports no engine: each loads with the first file that needs it."""

from __future__ import annotations

from pathlib import Path

from pmm_edge.errors import ModelError
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder

__all__ = ["Embedder", "embed_files", "load"]

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".safetensors"})


def load(path: str | Path, device: str | int | None = None, require_certificate: bool = False) -> Embedder:
    """Load a network to embed with.

    Args:
        path: `.onnx` runs in ONNX Runtime, an `.engine` in TensorRT; a checkpoint `.pt` or weights `.safetensors`
            run in PyTorch.
        device: `cpu`, `cuda` or `cuda:N`; None takes a GPU where the engine can use one, else the CPU, with a
            `PmmWarning` where there is a GPU and ONNX Runtime cannot use it. The embedder's `device` says which it
            became. Of a `.onnx` also `tensorrt` or `tensorrt:N`: ONNX Runtime's TensorRT provider, never taken by
            itself, as its first run builds for minutes.
        require_certificate: refuse a model that no `pmm bench` certified as it is now, before anything of it runs.

    Raises:
        ModelError: the file is missing, truncated or not ours, or its engine or device is not there; with
            `require_certificate` also where the certificate is missing, or it or the model was changed.
        NotOnThisMachineError, GpuError: an `.engine` without TensorRT, cuda-python or a GPU that runs it.
    """
    path = Path(path)
    return _load_certified(path, device) if require_certificate else _load(path, device)


def _load_certified(path: Path, device: str | int | None) -> Embedder:
    from pmm_edge.runtime.certificate import CertificateError, check_certificate, read_certified

    certificate, content = read_certified(path)
    embedder = _load(path, device, content)
    if path.suffix in TORCH_SUFFIXES:
        check_certificate(path)  # torch opened the file itself: data, so that it is not too late to ask again
    if embedder.spec != certificate.spec:
        raise CertificateError(
            f"the certificate of {path} is for a network of another spec", "Prove the model again with pmm bench"
        )
    return embedder


def _load(path: Path, device: str | int | None, content: bytes | None = None) -> Embedder:
    """Load a file; graphs and engines from `content`, where it was read already."""
    if path.suffix == ".onnx":
        from pmm_edge.runtime.onnx_backend import OnnxEmbedder

        return OnnxEmbedder(path, device, content)
    if path.suffix in TORCH_SUFFIXES:
        try:
            from pmm_edge.runtime.torch_backend import load_torch
        except ModuleNotFoundError as error:
            raise ModelError(
                f"{path} needs {error.name}, which is not installed",
                "pip install 'pmm-edge[train]', or load the .onnx that pmm export makes, which needs no torch",
            ) from error
        return load_torch(path, device)
    if path.suffix == ".engine":
        from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

        return TensorRTEmbedder(path, device, content=content)
    raise ModelError(
        f"{path} is of no kind that can be loaded",
        "Name a .onnx file, a TensorRT .engine, a checkpoint .pt or weights .safetensors",
    )
