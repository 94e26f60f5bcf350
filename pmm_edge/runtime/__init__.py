"""One Embedder over every engine. Each engine is imported when the first file needs it."""

from collections.abc import Callable
from pathlib import Path

from pmm_edge.errors import CHECKPOINT_MODULES, ModelError, absent, install
from pmm_edge.runs import resolve_checkpoint
from pmm_edge.runtime.certificate import CertificateError, open_model
from pmm_edge.runtime.embed_files import embed_files
from pmm_edge.runtime.embedder import Embedder
from pmm_edge.runtime.model_file import ModelFile

__all__ = ["Embedder", "embed_files", "load"]


def load(
    path: str | Path | ModelFile, device: str | int | None = None, require_certificate: bool | None = False
) -> Embedder:
    """Load a network.

        embedder = pmm_edge.load("model.onnx")
        embeddings = embedder.embed(crops)      # a list of (H, W, 3) uint8 RGB arrays -> (N, D) float32

    Args:
        path: `.onnx` runs in ONNX Runtime, `.engine` in TensorRT, a checkpoint `.pt`, `.safetensors` or a run folder
            (for its `best.pt`) in PyTorch. Or a file that `open_model` has read and checked.
        device: `cpu`, `cuda`, `cuda:N` or the index of a GPU. By default a GPU if the engine can use one, otherwise the
            CPU; a `PmmWarning` says when ONNX Runtime cannot use an existing GPU.
        require_certificate: refuse a model without a certificate of `pmm bench`. A certificate next to the model is
            checked in any case; None ignores it. What runs is the content that was checked, read once.

    Raises ModelError if the file is missing or damaged or its device is not available, CertificateError if the
    certificate is missing or does not match, NotOnThisMachineError or GpuError if an `.engine` cannot run here.
    """
    file, path = (path, path.path) if isinstance(path, ModelFile) else (None, Path(path))
    path = resolve_checkpoint(path) if path.is_dir() else path
    backend: Callable[[ModelFile, str | int | None], Embedder]
    if path.suffix == ".onnx":
        from pmm_edge.runtime.onnx_backend import OnnxEmbedder

        backend = OnnxEmbedder
    elif path.suffix == ".engine":
        from pmm_edge.runtime.tensorrt_backend import TensorRTEmbedder

        backend = TensorRTEmbedder
    elif path.suffix in (".pt", ".pth", ".safetensors"):
        if missing := absent(*CHECKPOINT_MODULES):
            remedy = f"{install('train')}, or use an .onnx export of it (pmm bench: --reference)"
            raise ModelError(f"{path} cannot be loaded: {missing}", remedy)
        from pmm_edge.runtime.torch_backend import load_torch as backend
    else:
        problem = "unknown suffix" if path.exists() else "it does not exist"
        remedy = "Name a run folder, or a .onnx, .engine, .pt or .safetensors file made by pmm-edge"
        raise ModelError(f"cannot load {path}: {problem}", remedy)
    file = file or open_model(path, require_certificate)
    embedder = backend(file, device)
    if file.certificate and embedder.spec != file.certificate.spec:
        raise CertificateError(f"the certificate of {path} has another spec than the model", "Run pmm bench again")
    return embedder
