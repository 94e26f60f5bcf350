"""ModelSpec: what a consumer of a network must know, in the checkpoint, in ONNX metadata and next to engines."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from pmm_edge.errors import ModelError
from pmm_edge.files import decode_json, encode_json

METADATA_KEY = "pmm_edge.spec"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FLOAT16_MAX = 65504.0
MAX_SIDE = 10_000  # of an input, in pixels

InputForm = Literal["uint8", "raw", "normalized"]
Distance = Literal["euclidean", "cosine"]  # cosine: 1 minus the cosine similarity, in 0..2
Method = Literal["pmm", "bdb", "pcb", "aos", "cama", "baseline"]
Mix = Literal["a-hard-mix", "dropblock", "cutout", "cutmix", "a-cutmix", "none"]
Precision = Literal["fp32", "fp16", "int8"]
FloatType = Literal["fp32", "fp16"]
QuantizationTarget = Literal["tensorrt", "cpu"]
CalibrationMethod = Literal["minmax", "percentile", "entropy"]
HardwareCompatibility = Literal["ampere", "same"]
"""GPUs that run a hardware-compatible engine: all since Ampere, or all with the compute capability of the builder's."""


@dataclass(frozen=True)
class InputSpec:
    """The input of a network.

    `form` is one of
    - `uint8`: (N, height, width, 3) uint8; the graph normalizes.
    - `raw`: (N, 3, height, width) float32 in 0..255; the graph normalizes.
    - `normalized`: (N, 3, height, width) float32, scaled to 0..1, minus `mean`, divided by `std`.

    Raises ValueError if a size, mean or std is out of range.
    """

    height: int
    width: int
    form: InputForm = "normalized"
    color: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize: Literal["bilinear"] = "bilinear"

    def __post_init__(self) -> None:
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise ValueError(f"an input of {self.height}x{self.width} pixels is out of range")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} or std {self.std} is not finite, or std is not positive")

    @property
    def layout(self) -> Literal["NHWC", "NCHW"]:
        return "NHWC" if self.form == "uint8" else "NCHW"

    @property
    def dtype(self) -> Literal["uint8", "float32"]:
        return "uint8" if self.form == "uint8" else "float32"

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        size = (self.height, self.width)
        return (batch, *size, 3) if self.layout == "NHWC" else (batch, 3, *size)


@dataclass(frozen=True)
class RetrievalFigures:
    """Retrieval on a data set's query and gallery, in 0..1 (paper section 3.1; mAP over the whole ranking)."""

    rank1: float
    mAP: float  # noqa: N815  the field's own spelling
    mINP: float  # noqa: N815
    mAP_at_50: float  # noqa: N815


@dataclass(frozen=True)
class Threshold:
    """Two images at a distance of at most `distance` show the same person. Rates are in 0..1.

    Each interval contains, with 95 % probability, the rate at this threshold of as many other people in front of the
    same cameras.
    """

    fmr: float  # nominal false-match rate: `distance` is the largest with at most this share of the impostor pairs
    distance: float
    false_matches: int  # impostor pairs at this distance or less, of `Calibration.impostor_pairs`
    fmr_interval: tuple[float, float]
    tmr: float  # true-match rate: share of the genuine pairs
    tmr_interval: tuple[float, float]


@dataclass(frozen=True)
class DistanceThresholds:
    """Decision thresholds for one distance."""

    eer: float  # equal error rate, in 0..1: where the rates of false matches and of missed matches are equal
    thresholds: tuple[Threshold, ...]  # of the nominal rates that the data supports, largest rate first


@dataclass(frozen=True)
class Calibration:
    """Decision thresholds from pairs of a query and a gallery image of different cameras (`pmm calibrate`)."""

    dataset: str
    data_sha256: str  # of its query and gallery images, as in certificates
    identities: int  # of the queries
    genuine_pairs: int  # of one person
    impostor_pairs: int  # of different people
    embedding_size: int  # of the network that the thresholds belong to
    euclidean: DistanceThresholds
    cosine: DistanceThresholds

    def threshold(self, fmr: float = 1e-3, distance: Distance = "euclidean") -> Threshold:
        """Return the threshold of a nominal false-match rate; raise ModelError if there is none."""
        if distance not in get_args(Distance):
            raise ModelError(f"the distance is '{distance}'", f"Choose {' or '.join(get_args(Distance))}")
        found = (self.euclidean if distance == "euclidean" else self.cosine).thresholds
        for threshold in found:
            if math.isclose(threshold.fmr, fmr):
                return threshold
        rates = ", ".join(f"{threshold.fmr:g}" for threshold in found) or "none"
        problem = f"there is no {distance} threshold for a false-match rate of {fmr:g}; {self.dataset} supports {rates}"
        raise ModelError(problem, "Choose one of these rates, or run pmm calibrate on more people")

    def of_unit_length(self) -> "Calibration":
        """The same decisions for embeddings scaled to unit length: their Euclidean distance is sqrt(2 x cosine)."""
        scaled = (replace(one, distance=math.sqrt(2 * max(one.distance, 0))) for one in self.cosine.thresholds)
        return replace(self, euclidean=replace(self.cosine, thresholds=tuple(scaled)))


@dataclass(frozen=True)
class Quantization:
    """How an INT8 graph was made."""

    target: QuantizationTarget  # the engine whose Q/DQ layout the graph follows
    method: CalibrationMethod
    calibration_images: int
    calibration_data: str | None = None  # the data set whose training images they are
    float_layers: tuple[str, ...] = ()  # kept in floating point by the sensitivity search
    float_type: FloatType = "fp32"  # of everything in the network that is not INT8


@dataclass(frozen=True)
class Reduction:
    """How a trained network got a smaller embedding without training (`pmm export --embedding-size`)."""

    checkpoint_sha256: str  # of the checkpoint with the full embedding
    from_size: int  # of the full embedding
    stages: dict[str, tuple[int, int]]  # the slice of the full embedding that each stage fills
    whitened: bool  # each value has a variance of 1 on the images
    images: int  # training images whose embeddings the projection was computed from
    dataset: str  # their data set, on whose query and gallery the figures were measured
    data_sha256: str  # fingerprint of the data set
    variance: float  # share of the variance of these embeddings that is kept, in 0..1
    before: RetrievalFigures  # of the full embedding, by Euclidean distance
    after: RetrievalFigures
    before_cosine: RetrievalFigures | None  # by cosine distance
    after_cosine: RetrievalFigures | None
    method: Literal["pca"] = "pca"


@dataclass(frozen=True)
class ModelSpec:
    """The contract that travels with every artifact of a trained network; raises ValueError for a size out of range."""

    architecture: Method
    backbone: str
    num_classes: int
    input: InputSpec
    embedding_size: int
    stages: dict[str, tuple[int, int]]  # the slice [start, stop) that each stage fills; empty for a reduced embedding
    mix_blocks: int | None = None  # K, the number of blocks that mixing replaces in training (paper section 2.2)
    block_size: tuple[int, int] = (3, 2)  # height and width of a block on the feature map
    mix: Mix = "a-hard-mix"
    rpp: bool = False  # PCB has refined part pooling
    distance: Distance = "euclidean"
    dataset: str | None = None
    teacher_sha256: str | None = None  # SHA-256 of the teacher's checkpoint
    retrieval: RetrievalFigures | None = None  # by Euclidean distance
    retrieval_cosine: RetrievalFigures | None = None  # by cosine distance, as trackers match
    calibration: Calibration | None = None  # decision thresholds; None before pmm calibrate
    checkpoint_sha256: str | None = None
    """SHA-256 of the checkpoint as it was trained: in its exports, and in itself after `pmm calibrate` rewrote it."""
    reduction: Reduction | None = None  # of the embedding, after training
    normalized_output: bool = False  # embeddings have unit L2 length
    precision: Precision = "fp32"
    quantization: Quantization | None = None
    gflops: float | None = None  # per image, a multiply-add counted as two; written at export
    parameters: int | None = None  # of the inference graph; written at export
    tools: dict[str, str] = field(default_factory=dict)  # versions of the packages that wrote it
    schema: Literal[1] = 1

    def __post_init__(self) -> None:
        sizes = {"num_classes": self.num_classes, "embedding_size": self.embedding_size}
        for name, value in {**sizes, "block height": self.block_size[0], "block width": self.block_size[1]}.items():
            if not 1 <= value <= 10_000_000:
                raise ValueError(f"{name} {value} is out of range")
        if self.reduction and not self.embedding_size < self.reduction.from_size <= 10_000_000:
            raise ValueError(f"{self.reduction.from_size} values cannot be reduced to {self.embedding_size}")
        if self.calibration and self.calibration.embedding_size != self.embedding_size:
            of_another = f"thresholds of embeddings of {self.calibration.embedding_size} values"
            raise ValueError(f"{of_another} do not apply to {self.embedding_size} values")

    def to_json(self) -> str:
        """One line of JSON with sorted keys."""
        return encode_json(self, indent=0)

    @staticmethod
    def from_json(text: str | bytes, source: str = "the model") -> "ModelSpec":
        """Read what `to_json` wrote; raise ModelError, which names `source`, if it is not a spec of this version."""
        remedy = "Export the model again with this version of pmm-edge"
        return decode_json(ModelSpec, text, f"the spec of {source}", ModelError, remedy)


def describe_precision(spec: ModelSpec) -> str:
    """How the precision was reached, for people: `int8 and fp16 for tensorrt, entropy calibration on 512 images`."""
    how = spec.quantization
    if how is None:
        return spec.precision
    data = f" of {how.calibration_data}" if how.calibration_data else ""
    types = f"{spec.precision} and {how.float_type}"
    text = f"{types} for {how.target}, {how.method} calibration on {how.calibration_images} images{data}"
    return f"{text}; kept in {how.float_type}: {', '.join(how.float_layers)}" if how.float_layers else text
