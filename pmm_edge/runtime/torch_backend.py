"""The reference: trained networks in PyTorch, from a checkpoint or from exported weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pmm_edge.errors import ModelError
from pmm_edge.images import Pixels
from pmm_edge.model import ReidNetwork, load_checkpoint
from pmm_edge.model.checkpoint import network_of
from pmm_edge.runtime.embedder import Embedder, Embeddings, parse_device
from pmm_edge.spec import METADATA_KEY, InputSpec, ModelSpec

CLASSIFIER = ".classifier."
"""In the name of every tensor that only training needs."""


class Preprocess(nn.Module):
    """From an input's form to (N, 3, H, W) float32, normalised; part of every exported graph."""

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
            # The cast comes first: TensorRT takes uint8 at a graph's input and nowhere behind it.
            images = images.float().permute(0, 3, 1, 2)
        return images * self.scale + self.shift


class TorchEmbedder(Embedder):
    """A network in PyTorch, eager, in the precision of its weights (TF32 is off: it is not FP32)."""

    def __init__(self, network: nn.Module, spec: ModelSpec, path: Path, device: str | int | None = None) -> None:
        target = torch_device(device)
        super().__init__(spec, path, "torch", str(target))
        self.threads = torch.get_num_threads()
        self._target = target
        self._preprocess = Preprocess(replace(spec.input, form="uint8")).to(target)
        self.network = network.to(target).eval()
        """From normalised images (N, 3, height, width) to embeddings."""

    def embed_prepared(self, images: Pixels) -> Embeddings:
        return self._run(lambda: self.network(self._preprocess(torch.tensor(images, device=self._target))), len(images))

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings:
        return self._run(lambda: self.network(torch.tensor(images, device=self._target)), len(images))

    def _run(self, embed: Callable[[], Tensor], batch: int) -> Embeddings:
        try:
            with torch.inference_mode(), without_tf32() if self._target.type == "cuda" else nullcontext():
                embeddings: Embeddings = embed().cpu().numpy()
                return embeddings
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                place = "this machine" if self._target.type == "cpu" else self.device
                problem = f"the memory of {place} does not hold a batch of {batch} of {self.path} in torch"
                raise ModelError(problem, "Choose a smaller batch, or end what else uses that memory") from error
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"torch cannot run {self.path} at batch {batch} on {self.device} ({reason})",
                "Try the device cpu; where it fails there as well, train or export again",
            ) from error


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let GPUs compute FP32 in FP32, for the whole process: TF32 keeps 10 bits of its 23.

    For convolutions, where it is torch's default, and for matrix products, where the caller may have chosen it.
    """
    products = torch.backends.cuda.matmul
    before, products.allow_tf32 = products.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        products.allow_tf32 = before


def load_torch(path: Path, device: str | int | None = None) -> TorchEmbedder:
    """Load a checkpoint (`.pt`) or exported weights (`.safetensors`).

    Raises:
        ModelError: the file is missing, truncated or not ours, or the device does not exist.
    """
    try:
        if path.suffix == ".safetensors":
            network, spec = _read_safetensors(path)
        else:
            checkpoint = load_checkpoint(path)
            network, spec = checkpoint.network(), checkpoint.spec
    except RuntimeError as error:
        raise ModelError(f"the weights in {path} are not those of its spec", "Train or export again") from error
    return TorchEmbedder(network, spec, path, device)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether memory did not suffice, a GPU's or the machine's, for which torch has no type of error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return re.search(r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc", str(error)) is not None


def _read_safetensors(path: Path) -> tuple[ReidNetwork, ModelSpec]:
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "Make it with pmm export --safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            spec_json = (file.metadata() or {}).get(METADATA_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is truncated or no safetensors file", "Export it again") from error
    if spec_json is None:
        raise ModelError(f"{path} carries no pmm-edge spec", "Make it with pmm export --safetensors")
    spec = ModelSpec.from_json(spec_json, str(path))
    network = network_of(spec)
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or any(CLASSIFIER not in name for name in missing):
        raise RuntimeError("tensors are missing or unknown")
    return network, spec


def torch_device(name: str | int | None) -> torch.device:
    """`cpu`, `cuda` or `cuda:N` for torch; None takes a GPU where there is one.

    Raises:
        ModelError: the name is none of these, or torch finds no such GPU.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, index = parse_device(name)
    if kind == "cpu":
        return torch.device("cpu")
    if index >= torch.cuda.device_count():
        raise ModelError(
            f"device {name} cannot be used: torch finds {torch.cuda.device_count()} GPUs",
            "Leave the device out, or install a CUDA build of torch and the driver",
        )
    return torch.device("cuda", index)
