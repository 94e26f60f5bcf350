"""Embedder: one interface over every engine that runs an exported or trained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError, ModelError
from pmm_edge.images import Pixels, prepare_crops
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import ModelSpec

Embeddings = NDArray[np.float32]

INPUT, OUTPUT = "images", "embeddings"
"""Names of an exported graph's input and output."""

CHUNK = 64
"""Crops that go through a network of any batch size at once, so that memory does not grow with their number."""


class Embedder(ABC):
    """A network that is ready to embed. Preprocessing follows from `spec` alone.

    Several threads may share an embedder, but for PyTorch on a GPU, where a call switches TF32 off for all.

    Attributes:
        spec: what the network is and what it is fed.
        path: the file it was loaded from.
        backend: `torch`, `onnxruntime`, `onnxruntime-tensorrt` (its TensorRT provider) or `tensorrt`.
        device: where it really runs: `cpu` or `cuda:N`.
        profile: the batch sizes that the engine takes; None where it takes any. Callers may give any: more goes
            through in chunks, fewer are padded.
        cuda_graphs: a batch is one CUDA graph, launched whole.
        threads: that compute on the CPU, as the engine was told; None where it decides by itself.
    """

    profile: BatchProfile | None = None
    cuda_graphs = False
    threads: int | None = None

    def __init__(self, spec: ModelSpec, path: Path, backend: str, device: str) -> None:
        if (spec.input.color, spec.input.resize) != ("RGB", "bilinear"):
            raise ModelError(
                f"{path} asks for {spec.input.color} images and {spec.input.resize} resizing",
                "Use the version of pmm-edge that made it; this one feeds RGB, resized bilinearly",
            )
        self.spec = spec
        self.path = path
        self.backend = backend
        self.device = device

    @property
    def loads_with(self) -> str:
        """The name of a device with which `pmm_edge.load` gives the same engine again, not only the same GPU."""
        return self.device

    @property
    def chunk(self) -> int:
        """Crops that are prepared and embedded at once.

        Whole batches of the profile's maximum, so that only the last one of all is padded; two at least, so that an
        engine can be fed the next one while it works. Its memory is that of its largest batch anyway.
        """
        if self.profile is None:
            return CHUNK
        return self.profile.maximum * max(2, CHUNK // self.profile.maximum)

    def embed(self, crops: Sequence[Pixels] | Pixels) -> Embeddings:
        """Embed crops of people.

        Args:
            crops: (H, W, 3) uint8 RGB arrays of any size, or one (N, H, W, 3) array. OpenCV reads BGR:
                pass `crop[:, :, ::-1]`.

        Returns:
            (N, D) float32, of length 1 where `spec.normalized_output`, else as the network gives them; (0, D) for no
            crops.

        Raises:
            DataError: a crop without pixels, grey, with an alpha channel, or of another type than uint8.
        """
        if isinstance(crops, np.ndarray) and crops.ndim == 3:
            raise DataError(f"one array of shape {crops.shape} is no list of crops", "Pass [crop]")
        size, chunk = self.spec.input, self.chunk
        embeddings = [
            self.embed_prepared(prepare_crops(crops[start : start + chunk], size.height, size.width, start))
            for start in range(0, len(crops), chunk)
        ]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.spec.embedding_size), np.float32)

    @abstractmethod
    def embed_prepared(self, images: Pixels) -> Embeddings:
        """Embed crops that are checked and of network size, all at once.

        Args:
            images: (N, height, width, 3) uint8 RGB, N >= 1.

        Returns:
            (N, D) float32.
        """

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings | None:
        """Embed what preprocessing would have given: for tests of what a wrong preprocessing does.

        Args:
            images: (N, 3, height, width) float32, as the network behind the preprocessing sees them.

        Returns:
            (N, D) float32; None where preprocessing lies inside of the engine and only pixels can be fed.
        """
        return None

    def gpu_milliseconds(self, images: Pixels) -> float | None:
        """How long the GPU takes for one run of the network, between two CUDA events around it.

        Copies to and from the GPU are left out. What the GPU waits for the CPU to launch is in it.

        Args:
            images: as of `embed_prepared`.

        Returns:
            Milliseconds; None where the engine does not tell.
        """
        return None


def parse_device(device: str | int, tensorrt: bool = False) -> tuple[str, int]:
    """Parse a device into its kind (`cpu`, `cuda` or `tensorrt`) and index.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, or the index of a GPU: `1` or `"1"`.
        tensorrt: also accept `tensorrt` and `tensorrt:1`, the TensorRT provider of ONNX Runtime.

    Raises:
        ModelError: the device is none of these.
    """
    name = str(device)
    kind, separator, index = ("cuda", ":", name) if name.isdecimal() else name.partition(":")
    kinds = ("cpu", "cuda", "tensorrt") if tensorrt else ("cpu", "cuda")
    if kind not in kinds or (separator and (kind == "cpu" or not index.isdecimal())):
        also = "; tensorrt runs only .onnx files" if kind == "tensorrt" else ""
        raise ModelError(f"unknown device '{name}'", f"Choose cpu, cuda, or cuda:N for GPU number N{also}")
    return kind, int(index or 0)
