"""PyTorch, the reference: networks from a checkpoint or from exported weights."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels
from pmm_edge.model import load_checkpoint
from pmm_edge.model.checkpoint import network_of
from pmm_edge.runtime.embedder import Embedder, Embeddings, parse_device
from pmm_edge.runtime.model_file import ModelFile
from pmm_edge.spec import METADATA_KEY, InputSpec, ModelSpec

CLASSIFIER = ".classifier."  # in the name of every tensor that only training needs


class Preprocess(nn.Module):
    """Convert an input form to normalized (N, 3, H, W) float32; part of every exported graph."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.form = spec.form
        mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.form == "normalized":
            return images
        if self.form == "uint8":
            # Cast first: TensorRT supports uint8 only at the input of a graph.
            images = images.float().permute(0, 3, 1, 2)
        return images * self.scale + self.shift


class TorchEmbedder(Embedder):
    """A network in eager PyTorch, in the precision of its weights; TF32 is off."""

    def __init__(self, network: nn.Module, spec: ModelSpec, path: Path, device: str | int | None = None) -> None:
        self._target = torch_device(device)
        super().__init__(spec, path, "torch", str(self._target))
        self.threads = torch.get_num_threads()
        self._preprocess = Preprocess(replace(spec.input, form="uint8")).to(self._target)
        self.network = network.to(self._target).eval()  # of normalized images (N, 3, height, width)

    def embed_prepared(self, images: Pixels) -> Embeddings:
        return self._run(images, self._preprocess)

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings:
        return self._run(images, nn.Identity())

    def _run(self, images: Pixels | NDArray[np.float32], preprocess: nn.Module) -> Embeddings:
        try:
            with torch.inference_mode(), without_tf32() if self._target.type == "cuda" else nullcontext():
                inputs = preprocess(torch.tensor(np.ascontiguousarray(images), device=self._target))
                return np.asarray(self.network(inputs).cpu())
        except (RuntimeError, MemoryError) as error:
            full, reason = is_out_of_memory(error), str(error).strip().partition("\n")[0] or type(error).__name__
            problem = f"torch cannot run {self.path} at batch {len(images)} on {self.device} ({reason})"
            raise ModelError(problem, "Choose a smaller batch" if full else "Try the device cpu") from error


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute FP32 in full precision on GPUs, for the whole process: TF32 keeps 10 of 23 mantissa bits."""
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = before


def load_torch(file: ModelFile, device: str | int | None = None) -> TorchEmbedder:
    """Load a checkpoint (`.pt`) or exported weights (`.safetensors`); see `pmm_edge.load`."""
    path = file.path
    if path.suffix != ".safetensors":
        checkpoint = load_checkpoint(path, file.content)
        return TorchEmbedder(checkpoint.network(), checkpoint.spec, path, device)
    try:
        spec = ModelSpec.from_json(file.metadata[METADATA_KEY], str(path))
        network = network_of(spec)
        classifiers = {name: tensor for name, tensor in network.state_dict().items() if CLASSIFIER in name}
        network.load_state_dict(classifiers | safetensors.torch.load(file.content))
    except (SafetensorError, KeyError, RuntimeError) as error:
        problem = f"{path} is not a complete file of pmm export --safetensors ({str(error).splitlines()[0]})"
        raise ModelError(problem, "Create it with pmm export --safetensors") from error
    return TorchEmbedder(network, spec, path, device)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return whether memory of a GPU or of the machine ran out; for the latter torch has no error type."""
    pattern = r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or re.search(pattern, str(error)) is not None


def torch_device(device: str | int | None) -> torch.device:
    """Return a torch device, for None a GPU if there is one; raise ModelError if torch finds no such GPU."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = parse_device(default if device is None else device)
    if kind == "cpu":
        return torch.device("cpu")
    if index >= (count := torch.cuda.device_count()):
        remedy = "Omit the device, or install a CUDA build of torch and the driver"
        raise ModelError(f"torch cannot use the device {device}: it finds {count} GPUs", remedy)
    return torch.device("cuda", index)
