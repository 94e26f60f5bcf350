"""Why a model departs from its reference: the known mistakes are made on purpose, and one is named where it explains.

The reference is fed what each mistake would have fed it. Where it then agrees with the model, and plainly better than
rightly fed, the model most likely makes that mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pmm_edge.progress import Report, silent
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import FLOAT16_MAX, InputSpec, ModelSpec

IMAGES = 16
"""How many images a mistake is tried on."""
LEFT = 0.2
"""An explanation leaves at most this share of the departure (1 - mean cosine) unexplained,"""
LEAST_COSINE = 0.95
"""and brings the mean cosine up to this; 8 bits take their part of it."""

Planes = NDArray[np.floating]
_Mistake = tuple[str, Callable[[Planes, InputSpec], Planes]]


def _normalized(pixels: Planes, size: InputSpec) -> Planes:
    """What the network must see: (N, 3, H, W) in 0..255 -> normalised."""
    mean, std = _channels(size)
    return (pixels / np.float32(255) - mean) / std


def _channels(size: InputSpec) -> tuple[Planes, Planes]:
    return np.array(size.mean, np.float32)[:, None, None], np.array(size.std, np.float32)[:, None, None]


def _as_planes(pixels: Planes) -> Planes:
    """Pixels in NHWC order whose memory is read as NCHW."""
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).reshape(pixels.shape)


_MISTAKES: Sequence[_Mistake] = (
    ("red and blue are swapped: it sees BGR", lambda x, s: _normalized(x[:, ::-1], s)),
    ("red and blue are swapped behind the normalisation", lambda x, s: _normalized(x, s)[:, ::-1]),
    ("normalisation is done twice", lambda x, s: _normalized(255 * _normalized(x, s), s)),
    ("normalisation is done twice, with two scalings to 0..1", lambda x, s: _normalized(_normalized(x, s), s)),
    ("normalisation is missing: it sees values of 0..1", lambda x, s: x / 255),
    ("normalisation is missing: it sees values of 0..255", lambda x, s: x),
    ("normalisation is another: it sees values of -1..1", lambda x, s: x / 127.5 - 1),
    ("the mean is not subtracted", lambda x, s: x / 255 / _channels(s)[1]),
    ("it is not divided by the standard deviation", lambda x, s: x / 255 - _channels(s)[0]),
    ("the scaling to 0..1 is missing before the normalisation", lambda x, s: _normalized(255 * x, s)),
    ("pixels are scaled to 0..1 twice before the normalisation", lambda x, s: _normalized(x / 255, s)),
    ("images are mirrored", lambda x, s: _normalized(x[..., ::-1], s)),
    ("images are upside down", lambda x, s: _normalized(x[:, :, ::-1], s)),
    ("the layout is wrong: NHWC pixels are read as NCHW", lambda x, s: _normalized(_as_planes(x), s)),
)
"""What each mistake feeds the network, from pixels as (N, 3, H, W) float32 in 0..255."""

_IN_PIXELS = ("it sees BGR", "mirrored", "upside down", "NHWC")
"""Those that can be made with pixels alone, for a reference that takes nothing else."""


def likely_cause(
    reference: Embedder,
    right: Embeddings,
    candidate: Embeddings,
    spec: ModelSpec,
    images: Pixels,
    report: Report = silent,
) -> str | None:
    """Name the mistake that explains a model's departure, to be read as a sentence; None where none does.

    Args:
        reference: what the mistakes are made with.
        right: (N, D), its embeddings of the images, rightly fed.
        candidate: (N, D), the model's.
        spec: the model's.
        images: (N, height, width, 3) uint8 of the reference's size.
        report: told how many mistakes are tried.
    """
    plain = float(cosines(right, candidate).mean())
    explained = [
        (float(cosines(wrong, candidate).mean()), cause)
        for cause, wrong in (
            *_mistaken_outputs(right, spec),
            *_mistaken_inputs(reference, images, report),
        )
    ]
    best, cause = max(explained, default=(plain, ""))
    return cause if best >= LEAST_COSINE and 1 - best <= LEFT * (1 - plain) else None


def overflow(spec: ModelSpec, embeddings: Embeddings) -> str | None:
    """Name what makes NaN or infinity of FP16 where the reference has none; None for anything else."""
    if spec.precision != "fp16" or np.isfinite(embeddings).all():
        return None
    return f"values are larger than float16 holds ({FLOAT16_MAX:.0f})"


def _mistaken_outputs(right: Embeddings, spec: ModelSpec) -> Iterator[tuple[str, Embeddings]]:
    """Stages in another order, or each brought to length 1."""
    slices = {name: right[:, start:stop] for name, (start, stop) in spec.stages.items()}
    if len(slices) < 2:
        return
    for order in permutations(slices):
        if order != tuple(slices):
            became = ", ".join(
                f"{old} where {new} belongs" for old, new in zip(order, slices, strict=True) if old != new
            )
            yield f"stages of the embedding are swapped: {became}", np.concatenate([slices[name] for name in order], 1)
    lengths = [np.linalg.norm(part, axis=1, keepdims=True) for part in slices.values()]
    units = [part / np.maximum(length, 1e-12) for part, length in zip(slices.values(), lengths, strict=True)]
    yield "each stage is brought to length 1 by itself, not the whole embedding", np.concatenate(units, axis=1)


def _mistaken_inputs(reference: Embedder, images: Pixels, report: Report) -> Iterator[tuple[str, Embeddings]]:
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
    for number, (cause, mistake) in enumerate(_MISTAKES):
        report("looking for the cause", number, len(_MISTAKES), cause)
        planes = np.ascontiguousarray(mistake(pixels, reference.spec.input), dtype=np.float32)
        embeddings = reference.embed_normalized(planes)
        if embeddings is None:
            if not any(part in cause for part in _IN_PIXELS):
                continue
            mean, std = _channels(reference.spec.input)
            back = np.rint((planes * std + mean) * 255).clip(0, 255).astype(np.uint8)
            embeddings = reference.embed_prepared(np.ascontiguousarray(back.transpose(0, 2, 3, 1)))
        yield cause, embeddings
    report("looking for the cause", len(_MISTAKES), len(_MISTAKES))
