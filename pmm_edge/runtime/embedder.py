"""Embedder: one interface to every engine that runs a network."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pmm_edge.errors import DataError, ModelError
from pmm_edge.images import ColorOrder, Crop, Pixels, cut_boxes, prepare_crops
from pmm_edge.machine import sums_in_float16
from pmm_edge.retrieval.distances import pairwise_distances
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import Distance, ModelSpec, Threshold

Embeddings = NDArray[np.float32]

INPUT, OUTPUT = "images", "embeddings"  # of an exported graph
CHUNK = 64  # maximum batch for engines without a batch profile, so that memory does not grow with the number of crops


@dataclass(frozen=True)
class Match:
    """A decision about two images; true in a condition if they show the same person."""

    same: bool  # whether `distance` is at most that of the threshold
    distance: float
    metric: Distance
    threshold: Threshold
    calibrated_on: str  # data set

    def __bool__(self) -> bool:
        return self.same


class Embedder(ABC):
    """A loaded network from `path`. Its preprocessing follows from `spec` alone.

    `backend` is `torch`, `onnxruntime` or `tensorrt`, `device` is `cpu` or `cuda:N`. Threads may share an embedder,
    except PyTorch on a GPU, where a call changes the TF32 setting of the process while it runs.
    """

    profile: BatchProfile | None = None  # larger batches are split, smaller ones padded; None accepts any batch
    cuda_graphs = False  # whether each batch size runs as one CUDA graph
    threads: int | None = None  # CPU threads set for the engine; None if the engine chooses

    def __init__(self, spec: ModelSpec, path: Path, backend: str, device: str) -> None:
        self.spec, self.path, self.backend, self.device = spec, path, backend, device

    @property
    def float16_sums(self) -> bool:
        """Whether sums of products are rounded to float16 after each addition, not to float32 (docs/precision.md)."""
        kernels = self.backend == "onnxruntime" and self.device == "cpu" and self.spec.precision == "fp16"
        return kernels and sums_in_float16()

    @property
    def chunk(self) -> int:
        """Number of crops to embed at once: at least two batches of the profile's maximum, which can overlap."""
        return CHUNK if self.profile is None else self.profile.maximum * max(2, CHUNK // self.profile.maximum)

    def embed(self, crops: Sequence[Crop] | Pixels, order: ColorOrder = "rgb") -> Embeddings:
        """Embed crops of people: (N, D) float32, of unit length if `spec.normalized_output`.

        `crops` is a list of (H, W, 3) uint8 arrays of any size, paths and PIL images, or one (N, H, W, 3) array.
        `order` is the order of the channels of arrays: OpenCV reads `bgr`. Files and PIL images are turned upright as
        their EXIF orientation says. Raises DataError, which names the crop or file, if an array is empty, grayscale,
        not uint8 or has an alpha channel, or an image cannot be read.
        """
        if isinstance(crops, str | os.PathLike | Image.Image) or (isinstance(crops, np.ndarray) and crops.ndim == 3):
            found = (
                f"one array of shape {crops.shape}" if isinstance(crops, np.ndarray) else f"one {type(crops).__name__}"
            )
            raise DataError(f"expected a list of crops, got {found}", "Pass [crop]")
        if order not in get_args(ColorOrder):
            raise DataError(f"unknown color order '{order}'", f"Pass {' or '.join(get_args(ColorOrder))}")
        size, chunk = self.spec.input, self.chunk
        embeddings = [
            self.embed_prepared(prepare_crops(crops[start : start + chunk], size.height, size.width, start, order))
            for start in range(0, len(crops), chunk)
        ]
        return np.concatenate(embeddings) if embeddings else np.empty((0, self.spec.embedding_size), np.float32)

    def embed_boxes(self, frame: Pixels, boxes: ArrayLike, order: ColorOrder = "rgb") -> Embeddings:
        """Embed the people in a frame: (N, D) float32, one row for each box, as a tracker needs them.

            features = embedder.embed_boxes(frame, detections[:, :4], order="bgr")  # a frame of OpenCV

        `frame` is an (H, W, 3) uint8 array, `boxes` are (N, 4) x1 y1 x2 y2 in pixels, integers or floats. Boxes are
        rounded to whole pixels and clipped to the frame; only their pixels are read. Raises DataError with the indices
        of all boxes that are not finite or have no pixel in the frame.
        """
        return self.embed(cut_boxes(frame, boxes), order)

    def distances(
        self,
        queries: Sequence[Crop] | Pixels | Embeddings,
        gallery: Sequence[Crop] | Pixels | Embeddings,
        distance: Distance | None = None,
        order: ColorOrder = "rgb",
    ) -> NDArray[np.float32]:
        """Compute the distances between Q queries and G gallery images: (Q, G) float32, smaller is more similar.

        Each side is either crops, as `embed` takes them, or their embeddings, (N, D). `distance` is `euclidean`,
        `cosine` (1 - cosine) or, by default, that of the spec. Raises DataError for embeddings of another size, for NaN
        and infinity, for crops as `embed` does, and by cosine for embeddings of length 0.
        """
        both: list[Embeddings] = []
        for side in (queries, gallery):
            ready = isinstance(side, np.ndarray) and side.ndim == 2
            rows: Any = side if ready else self.embed(side, order)  # type: ignore[arg-type]  # crops
            if rows.shape[1] != self.spec.embedding_size:
                problem = f"the embeddings have {rows.shape[1]} values, those of {self.path} {self.spec.embedding_size}"
                raise DataError(problem, "Compute them with this model")
            both.append(rows)
        return pairwise_distances(both[0], both[1], distance or self.spec.distance)

    def match(
        self, a: Crop, b: Crop, fmr: float = 1e-3, distance: Distance | None = None, order: ColorOrder = "rgb"
    ) -> Match:
        """Decide whether two crops show the same person, at a rate of false matches that was calibrated.

            if embedder.match("a.jpg", "b.jpg", fmr=1e-3): ...

        At most a share `fmr` of the pairs of different people in the calibration data match (docs/thresholds.md). For
        many pairs, compare `distances` with `spec.calibration.threshold(fmr, distance).distance`. Raises ModelError if
        the model has no thresholds, or none for this rate, and DataError as `distances` does.
        """
        metric, calibration = distance or self.spec.distance, self.spec.calibration
        if calibration is None:
            remedy = "Run pmm calibrate CHECKPOINT DATA; exports get the thresholds from pmm export"
            raise ModelError(f"{self.path} has no decision thresholds", remedy)
        threshold = calibration.threshold(fmr, metric)
        found = float(self.distances([a], [b], metric, order)[0, 0])
        return Match(found <= threshold.distance, found, metric, threshold, calibration.dataset)

    @abstractmethod
    def embed_prepared(self, images: Pixels) -> Embeddings:
        """Embed crops of network size: (N, height, width, 3) uint8 RGB, N >= 1 -> (N, D) float32."""

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings | None:
        """Embed preprocessed (N, 3, height, width) float32 images; None if the engine accepts only pixels."""
        return None

    def gpu_milliseconds(self, images: Pixels) -> float | None:
        """Time one run on `images`, as in `embed_prepared`, with CUDA events, without copies; None without a timer."""
        return None


def parse_device(device: str | int) -> tuple[str, int]:
    """Parse `cpu`, `cuda`, `cuda:1` or the index of a GPU into kind and index; raise ModelError for anything else."""
    name = str(device)
    kind, separator, index = ("cuda", ":", name) if name.isdecimal() else name.partition(":")
    if kind not in ("cpu", "cuda") or (separator and (kind == "cpu" or not index.isdecimal())):
        raise ModelError(f"unknown device '{name}'", "Choose cpu, cuda, or cuda:N for GPU number N")
    return kind, int(index or 0)
