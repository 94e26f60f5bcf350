"""The data model of `bench.json`; docs/bench-json.md describes every entry, its units and what null means."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from pmm_edge.errors import DataError
from pmm_edge.files import decode_json, encode_json, written_whole
from pmm_edge.spec import Distance, Precision, RetrievalFigures

QUANTILES = 101
"""Number of stored cosine quantiles: the minimum, the 1st to the 99th percentile, the maximum."""

Scope = Literal["model", "end to end"]
Neighbors = Literal["black images", "white images", "noise", "other images"]
AtLeastOne = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Gates:
    """Acceptance thresholds of a model; `max_map_drop` and `max_tmr_drop` are in points of 100."""

    min_cosine: float = 0.9999
    max_map_drop: float = 0.1
    min_mean_cosine: float = 0.0
    max_stretch: float = 1.001
    max_fmr_factor: float = 1.05
    max_tmr_drop: float = 0.1


class InvariantName(Enum):
    """Properties that every correct engine has, whatever the weights."""

    FINITE = "finite"
    DISTINCT = "distinct"
    UNIT_LENGTH = "unit length"
    REPEATABLE = "repeatable"
    EQUAL_ROWS = "equal rows"
    BATCH_SIZE = "batch size"
    NEIGHBORS = "neighbors"


@dataclass(frozen=True)
class Invariant:
    """The result of checking one invariant."""

    name: InvariantName
    held: bool
    value: float | None = None
    tolerance: float | None = None
    image: str = ""
    other_image: str = ""
    images: int = 0
    batch: int | None = None
    row: int | None = None
    neighbors: Neighbors | None = None


@dataclass(frozen=True)
class Closeness:
    """Distance between a slice of a model's embeddings and the same slice of the reference, over all images."""

    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    largest_relative: float | None
    worst_image: str


@dataclass(frozen=True)
class Parity:
    """Comparison of a model's embeddings with the reference."""

    whole: Closeness
    stages: dict[str, Closeness]
    cosine_quantiles: Annotated[list[float], Meta(min_length=QUANTILES, max_length=QUANTILES)]
    shortest: float
    longest: float
    stretched_image: str


@dataclass(frozen=True)
class Change:
    """A figure of the model minus that of the reference, with the 95 % interval of a paired bootstrap.

    It is drawn over queries; that of a true-match rate, over people.
    """

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class RetrievalChange:
    """Effect of a model's differences on retrieval."""

    rank1: Change
    mAP: Change  # noqa: N815  the field's own spelling
    mINP: Change  # noqa: N815
    queries: int


@dataclass(frozen=True)
class ChangedPair:
    """A query and a gallery image on opposite sides of a threshold for the reference and the model."""

    query_image: str
    gallery_image: str
    same_person: bool
    reference_distance: float
    distance: float


@dataclass(frozen=True)
class Decision:
    """The matches of a model at one threshold of its spec."""

    distance: Distance
    threshold: float
    nominal: float
    fmr: float
    reference_fmr: float
    fmr_ratio: Positive
    fmr_ratio_low: float
    fmr_ratio_high: float
    tmr: float
    tmr_change: Change
    changed: int
    worst: list[ChangedPair]


@dataclass(frozen=True)
class Decisions:
    """The matches of a model at all thresholds of its spec, on pairs of a query and a gallery image."""

    dataset: str
    same_images: bool
    genuine_pairs: int
    impostor_pairs: int
    thresholds: list[Decision]


class FailureKind(Enum):
    """Why a model fails."""

    COSINE = "cosine"
    MEAN_COSINE = "mean cosine"
    LENGTH = "length"
    MAP_DROP = "mAP drop"
    FALSE_MATCHES = "false matches"
    TRUE_MATCHES = "true matches"
    INVARIANT = "invariant"
    PRECISION = "precision"
    EMBEDDING_SIZE = "embedding size"
    CANNOT_RUN = "cannot run"


@dataclass(frozen=True)
class Failure:
    """One gate or invariant that a model fails."""

    kind: FailureKind
    value: float | None = None
    limit: float | None = None
    image: str = ""
    invariant: Invariant | None = None
    change: Change | None = None
    detail: str = ""
    decision: Decision | None = None


class Cause(Enum):
    """Known mistakes that explain a difference from the reference."""

    BGR = "BGR instead of RGB"
    BGR_AFTER_NORMALIZATION = "BGR instead of RGB after normalization"
    NORMALIZED_TWICE = "normalized twice"
    NORMALIZED_AND_SCALED_TWICE = "normalized and scaled twice"
    NOT_NORMALIZED_UNIT = "not normalized, values in 0..1"
    NOT_NORMALIZED_RAW = "not normalized, values in 0..255"
    NORMALIZED_SYMMETRICALLY = "normalized to -1..1"
    MEAN_MISSING = "mean not subtracted"
    STD_MISSING = "not divided by the standard deviation"
    SCALING_MISSING = "not scaled to 0..1"
    SCALED_TWICE = "scaled to 0..1 twice"
    MIRRORED = "images mirrored"
    UPSIDE_DOWN = "images upside down"
    NHWC_AS_NCHW = "NHWC read as NCHW"
    STAGES_SWAPPED = "stages swapped"
    STAGES_NORMALIZED = "each stage normalized to unit length"
    FLOAT16_OVERFLOW = "values exceed the range of float16"


@dataclass(frozen=True)
class LikelyCause:
    """A known mistake that explains the failures of a model."""

    cause: Cause
    cosine: float | None = None
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Departure:
    """The node of a graph at which a model departs from the reference."""

    node: str
    operator: str
    layer: str
    cosine: float
    before: float
    gradual: bool
    dtype: str
    value_range: tuple[float, float] | None
    reference_range: tuple[float, float] | None
    weights_cosine: float | None = None


@dataclass(frozen=True)
class Clocks:
    """Range of a clock, read at the end of each turn while the device was under load."""

    min_mhz: int
    max_mhz: int


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one batch."""

    batch: AtLeastOne
    scope: Scope
    cuda_graph: bool
    runs: AtLeastOne
    median_ms: Positive
    p90_ms: Positive
    p99_ms: Positive
    variation: float
    images_per_second: float
    ratio: Positive
    ratio_low: float
    ratio_high: float
    gpu_ms: float | None = None
    cpu_clocks: Clocks | None = None
    gpu_clocks: Clocks | None = None


@dataclass(frozen=True)
class ColdStart:
    """A new process that loads the model and embeds one crop, then a batch."""

    first_embedding_ms: Positive
    peak_memory_mib: Positive
    batch: AtLeastOne


@dataclass(frozen=True)
class Energy:
    """Energy of the device while the model runs; idle power is not subtracted."""

    joules_per_embedding: Positive
    watts: float
    source: Literal["NVML", "INA3221"]
    batch: AtLeastOne
    seconds: float


@dataclass(frozen=True)
class Environment:
    """The machine, its settings and the software versions. None where the system does not report a value."""

    cpu: str
    cores: int
    usable_cores: float
    instruction_set: str
    os: str
    python: str
    versions: dict[str, str]
    board: str | None = None
    l4t: str | None = None
    power_mode: str | None = None
    gpu: str | None = None
    driver: str | None = None
    load: float | None = None
    governors: tuple[str, ...] = ()
    clocks_locked: bool = False
    cpu_clocks: Clocks | None = None
    gpu_clocks: Clocks | None = None
    gpu_max_mhz: int | None = None
    thread_settings: dict[str, str] = field(default_factory=dict)
    threads: dict[str, int | None] = field(default_factory=dict)


class WarningKind(Enum):
    """Why figures are missing or less reliable."""

    NO_IDENTITIES = "no identities"
    LIMITED = "limited"
    UNREADABLE = "unreadable"
    PRECISION_NOT_CHECKED = "precision not checked"
    REFERENCE_BROKEN = "reference broken"
    SAME_FILE = "same file"
    NO_THRESHOLDS = "no thresholds"
    OTHER_RATES = "other rates"
    NOT_MEASURED = "not measured"
    BUSY = "busy"
    NOISY = "noisy"
    THROTTLED = "throttled"


@dataclass(frozen=True)
class BenchWarning:
    """A reason why figures are missing or less reliable."""

    kind: WarningKind
    model: str = ""  # of `unreadable`, the image
    value: float | None = None
    limit: float | None = None
    count: int | None = None
    total: int | None = None
    detail: str = ""


@dataclass
class ModelReport:
    """All figures of one model. The bench fills them in as it measures."""

    path: str
    sha256: str
    file_bytes: AtLeastOne
    precision: Precision
    embedding_size: int
    gflops: float | None
    parameters: int | None
    backend: str
    device: str
    gates: Gates
    float16_sums: bool = False
    """Whether FP16 sums are rounded to float16 after each addition, not to float32; the gates are then wider."""
    invariants: list[Invariant] = field(default_factory=list)
    parity: Parity | None = None
    retrieval: RetrievalFigures | None = None
    retrieval_cosine: RetrievalFigures | None = None
    cmc: list[float] = field(default_factory=list)
    retrieval_change: RetrievalChange | None = None
    decisions: Decisions | None = None
    failures: list[Failure] = field(default_factory=list)
    likely_cause: LikelyCause | None = None
    departure: Departure | None = None
    latency: list[Latency] = field(default_factory=list)
    cold_start: ColdStart | None = None
    energy: Energy | None = None


@dataclass
class BenchReport:
    """A reference and the models that were compared with it."""

    reference: ModelReport
    models: list[ModelReport]
    data: str
    data_sha256: str
    images: int
    environment: Environment
    created: str
    complete: bool = True
    warnings: list[BenchWarning] = field(default_factory=list)
    schema: Literal[1] = 1

    @property
    def failures(self) -> list[tuple[ModelReport, Failure]]:
        return [(model, failure) for model in (self.reference, *self.models) for failure in model.failures]

    @property
    def passed(self) -> bool:
        return self.complete and not self.failures

    def to_json(self) -> str:
        return encode_json({"passed": self.passed, **vars(self)})

    def save(self, path: Path) -> None:
        """Write `bench.json` atomically; raise OutputError if the file cannot be written."""
        with written_whole(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")


def read_report(path: Path) -> BenchReport:
    """Read a report that `BenchReport.save` wrote; unknown entries are ignored.

    Raises DataError if the file is missing, is not JSON, has another schema, or has a missing or wrong entry.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Name a bench.json that pmm bench wrote") from error
    return decode_json(BenchReport, text, str(path))
