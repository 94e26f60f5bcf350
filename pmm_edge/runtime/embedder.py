"""Embedder: one interface over every engine that runs an exported or trained network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pmm_edge.errors import DataError, ModelError
from pmm_edge.runtime.build_settings import BatchProfile
from pmm_edge.runtime.crops import Pixels, prepare_crops
from pmm_edge.spec import ModelSpec

Embeddings = NDArray[np.float32]

INPUT, OUTPUT = "images", "embeddings"
"""Names of an exported graph's input and output."""

CHUNK = 64
"""Crops that go through the network at once, so that memory does not grow with the number of crops."""


class Embedder(ABC):
    """A network that is ready to embed. Preprocessing follows from `spec` alone.

    Several threads may share an embedder, but for PyTorch on a GPU, where a call switches TF32 off for all.

    Attributes:
        spec: what the network is and what it is fed.
        path: the file it was loaded from.
        backend: `torch`, `onnxruntime` or `tensorrt`.
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

    def embed(self, crops: Sequence[Pixels] | Pixels) -> Embeddings:
        """Embed crops of people.

        Args:
            crops: (H, W, 3) uint8 RGB arrays of any size, or one (N, H, W, 3) array. OpenCV reads BGR:
                pass `crop[:, :, ::-1]`.

        Returns:
            (N, D) float32, not normalised; (0, D) for no crops.

        Raises:
            DataError: a crop without pixels, grey, with an alpha channel, or of another type than uint8.
        """
        if isinstance(crops, np.ndarray) and crops.ndim == 3:
            raise DataError(f"one array of shape {crops.shape} is no list of crops", "Pass [crop]")
        size = self.spec.input
        embeddings = [
            self.embed_prepared(prepare_crops(crops[start : start + CHUNK], size.height, size.width, start))
            for start in range(0, len(crops), CHUNK)
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


def parse_device(device: str) -> tuple[str, int]:
    """`cpu`, `cuda` or `cuda:1` as a kind and an index.

    Raises:
        ModelError: the name is none of these.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or device == kind):
        raise ModelError(f"device '{device}' is unknown", "Choose cpu, cuda, or cuda:N for the GPU with number N")
    return kind, int(index or 0)
