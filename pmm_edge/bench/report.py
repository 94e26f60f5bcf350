"""Everything that a bench measures, as plain data: this file is the schema of `bench.json`.

Shares (Rank-1, mAP, mINP, cosine) are in 0..1, times and sizes carry their unit in the name. A figure that was not
measured is None, in JSON null, and so is one that is not finite. New entries may be added; one that changes its meaning
or goes raises `SCHEMA`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from pmm_edge.errors import DataError, PmmError
from pmm_edge.files import written_whole
from pmm_edge.spec import RetrievalFigures

SCHEMA = 1
QUANTILES = 101
"""Of cosines: the least, the 1st to the 99th percentile, the largest."""

InvariantName = Literal["finite", "distinct", "unit length", "repeatable", "equal rows", "batch size", "neighbours"]
Scope = Literal["model", "end to end"]


@dataclass(frozen=True)
class Gates:
    """What a model must hold to pass."""

    min_cosine: float = 0.9999
    """Least cosine similarity of any image's embedding to the reference's."""
    max_map_drop: float = 0.1
    """Largest loss of mAP, in points of 100."""
    min_mean_cosine: float = 0.0
    """Least mean of the cosines."""
    max_stretch: float = 1.001
    """How many times longer or shorter than its reference's any image's embedding may be."""


@dataclass(frozen=True)
class Closeness:
    """How near a slice of a model's embeddings is to the same slice of its reference's, over all images."""

    cosine_min: float
    cosine_p1: float
    """The 1st percentile."""
    cosine_mean: float
    largest_difference: float
    """Of any value; infinite where one is not finite."""
    largest_relative: float
    """Of any value, as a share of the largest of its reference embedding."""
    worst_image: str
    """The one with the least cosine."""


@dataclass(frozen=True)
class Parity:
    """A model's embeddings beside its reference's."""

    images: int
    whole: Closeness
    stages: dict[str, Closeness]
    """By the stage's name in the spec; its slice of the embedding alone."""
    cosine_quantiles: list[float]
    """`QUANTILES` of the whole embedding's cosines."""
    shortest: float | None = None
    """Least length of an image's embedding over its reference's; rows of zeros or not finite are left out."""
    longest: float | None = None
    stretched_image: str = ""
    """The one whose length departs most."""


@dataclass(frozen=True)
class Invariant:
    """A property that every network has, whatever its weights; an engine that lacks it is broken."""

    name: InvariantName
    held: bool
    detail: str
    """What was compared and the largest difference found, or on which image it broke."""


@dataclass(frozen=True)
class Change:
    """A figure of the model less that of its reference, with the 95 % interval of a paired bootstrap over queries."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class FirstHit:
    """A query that another image comes first for than with the reference."""

    query: str
    reference: str
    reference_right: bool
    model: str
    model_right: bool


@dataclass(frozen=True)
class RetrievalChange:
    """What the model's departures do to retrieval."""

    rank1: Change
    mAP: Change  # noqa: N815  the field's own spelling
    mINP: Change  # noqa: N815
    queries: int
    """That have a match in the gallery."""
    first_hits: list[FirstHit]
    """All queries whose first hit changed; those that became wrong first."""
    reference: RetrievalFigures | None = None
    """What the model's figures are held against: the reference's own, or where only the model gives embeddings of
    length 1, those of the reference's embeddings brought to length 1."""


@dataclass(frozen=True)
class Departure:
    """Where a model first departs from its reference inside the graph."""

    node: str
    operator: str
    output: str
    cosine: float
    """Of the node's output to the reference's, on the image that departs most."""
    before: float
    """The least cosine of the node's inputs: what it was given was right."""
    words: str
    """One sentence for people."""


@dataclass(frozen=True)
class Clocks:
    """The range of a clock, asked at the end of each turn while the device was still hot."""

    least_mhz: int
    most_mhz: int


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one batch."""

    batch: int
    scope: Scope
    """`model`: from uint8 crops of network size to embeddings in host memory; `end to end`: from image files."""
    cuda_graph: bool
    runs: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    variation: float
    """Coefficient of variation: standard deviation over mean."""
    images_per_second: float
    """At the median."""
    ratio: float
    """Of the medians, to the reference's in the same turns."""
    ratio_low: float
    """95 % interval of the ratio, by bootstrap over turns."""
    ratio_high: float
    gpu_ms: float | None = None
    """Median time between CUDA events around a TensorRT engine; None for other engines."""
    cpu_clocks: Clocks | None = None
    """Of the fastest core; None where the system does not tell, as in most virtual machines."""
    gpu_clocks: Clocks | None = None
    """None where it ran on the CPU, or nobody tells."""
    slowed_by: list[str] = field(default_factory=list)
    """What kept the GPU's clocks down at the end of any turn, to be read after `slowed down by`."""


@dataclass(frozen=True)
class Stream:
    """Single crops from several clients at once, gathered into batches as they come."""

    clients: int
    largest_batch: int
    """Of the crops that were gathered; the cap on a batch is the same for all models."""
    crops: int
    crops_per_second: float
    median_ms: float
    """From a client's call to its embedding."""
    p90_ms: float
    p99_ms: float
    mean_batch: float


@dataclass(frozen=True)
class ColdStart:
    """A process of its own that loads the model and embeds one crop."""

    first_embedding_ms: float
    """From the start of loading, Python's own start and the imports of the engine included."""
    peak_memory_mib: float
    """Largest resident set of that process, after a batch of `batch`."""
    batch: int
    peak_gpu_memory_mib: float | None = None


@dataclass(frozen=True)
class Compute:
    """What the network must compute, and how near the engine comes to what the machine can."""

    gflops: float
    """Floating-point operations of one image, a multiplication and an addition counted as two."""
    parameters: int
    peak_gflops_per_second: float | None
    """Of a large matrix product in FP32, measured on this device in the same run."""
    share_of_peak: float | None
    """Largest over the batch sizes; above 1 where the engine computes in fewer bits than FP32."""


@dataclass(frozen=True)
class Energy:
    """Energy of the device while the model runs, idle power not subtracted."""

    joules_per_embedding: float
    watts: float
    source: Literal["NVML", "INA3221", "RAPL"]
    batch: int
    seconds: float


@dataclass(frozen=True)
class ModelReport:
    """One model's figures."""

    path: str
    sha256: str
    file_bytes: int
    precision: str
    embedding_size: int
    backend: str
    device: str
    gates: Gates
    invariants: list[Invariant]
    parity: Parity | None
    """None for the reference itself, and where the embeddings cannot be compared."""
    retrieval: RetrievalFigures | None
    """None where not all images were embedded, not to finite numbers, or the images have no identities."""
    cmc: list[float]
    """Share of queries with a match among the first 1, 2, … 50; empty where `retrieval` is None."""
    retrieval_change: RetrievalChange | None
    latency: list[Latency]
    failures: list[str]
    """A sentence for each gate that the model fails, to be read after its name."""
    likely_cause: str | None = None
    """Where a known mistake explains the failures: which."""
    departure: Departure | None = None
    """With `--explain`."""
    stream: Stream | None = None
    cold_start: ColdStart | None = None
    compute: Compute | None = None
    energy: Energy | None = None


@dataclass(frozen=True)
class BenchReport:
    """A reference, and the models that were compared with it."""

    reference: ModelReport
    models: list[ModelReport]
    data: str
    data_sha256: str
    """Over the names and contents of all images, in their order."""
    images: int
    environment: dict[str, str]
    created: str
    """UTC, ISO 8601."""
    complete: bool = True
    """False where it was interrupted: what had been measured by then."""
    warnings: list[str] = field(default_factory=list)
    """What makes the figures less worth: a busy machine, few queries."""
    schema: int = SCHEMA

    @property
    def failures(self) -> list[str]:
        """A sentence for each gate that failed, with the model's path in front."""
        return [f"{model.path} {failure}" for model in (self.reference, *self.models) for failure in model.failures]

    @property
    def passed(self) -> bool:
        return self.complete and not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain values; null where a figure is not finite, which JSON cannot say."""
        content: dict[str, Any] = _finite({"passed": self.passed, **asdict(self)})
        return content

    def save(self, path: Path) -> None:
        """Write `bench.json`, whole.

        Raises:
            OutputError: the file cannot be written.
        """
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


LOWER_PRECISION = {
    "fp16": Gates(min_cosine=0.999, max_map_drop=0.1, min_mean_cosine=0.9999, max_stretch=1.01),
    "int8": Gates(min_cosine=0.95, max_map_drop=0.5, min_mean_cosine=0.99, max_stretch=1.1),
}
"""What is asked of a model in a lower precision where nothing else is: rounding to 8 bits moves single embeddings."""


@dataclass(frozen=True)
class AskedGates:
    """What a user asks of all models; None leaves it to the model's precision.

    Raises:
        PmmError: a gate that is no number that could be held.
    """

    min_cosine: float | None = None
    min_mean_cosine: float | None = None
    max_map_drop: float | None = None
    max_stretch: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_cosine", "min_mean_cosine"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise PmmError(f"{name} {value:g} is no cosine", "Choose -1 to 1, such as 0.999")
        if self.max_map_drop is not None and not 0 <= self.max_map_drop < math.inf:
            raise PmmError(f"max_map_drop {self.max_map_drop:g} is no loss", "Choose points of mAP, such as 0.5")
        if self.max_stretch is not None and not 1 <= self.max_stretch < math.inf:
            raise PmmError(f"max_stretch {self.max_stretch:g} is no ratio of lengths", "Choose 1 or more, such as 1.05")

    def of(self, precision: str) -> Gates:
        """The gates of a model of this precision."""
        usual = LOWER_PRECISION.get(precision, Gates())
        return replace(usual, **{name: asked for name, asked in vars(self).items() if asked is not None})


def cosine_failures(whole: Closeness, gates: Gates) -> list[str]:
    """A sentence for each gate on cosine that a model fails."""
    failures = []
    if not whole.cosine_min >= gates.min_cosine:
        failures.append(
            f"cosine {whole.cosine_min:.6f} is {gates.min_cosine - whole.cosine_min:.2g} below the least allowed"
            f" {gates.min_cosine:g}, on {whole.worst_image} (mean {whole.cosine_mean:.6f})"
        )
    if not whole.cosine_mean >= gates.min_mean_cosine:
        failures.append(
            f"mean cosine {whole.cosine_mean:.6f} is {gates.min_mean_cosine - whole.cosine_mean:.2g} below the least"
            f" allowed {gates.min_mean_cosine:g}"
        )
    return failures


def length_failure(parity: Parity, gates: Gates) -> str | None:
    """The sentence where an embedding points the right way but is longer or shorter than its reference's.

    Cosine does not see it; Euclidean distances, and every threshold on them, do.
    """
    shortest, longest, most = parity.shortest, parity.longest, gates.max_stretch
    if shortest is None or longest is None or 1 / most <= shortest <= longest <= most:
        return None
    worst = longest if longest * shortest >= 1 else shortest
    return (
        f"the embedding of {parity.stretched_image} is {worst:.4g} times as long as the reference's (all of them"
        f" {shortest:.4g} to {longest:.4g}), {1 / most:.4g} to {most:.4g} are allowed: distances and every threshold on"
        " them change"
    )


def map_failure(reference: float, candidate: float, change: RetrievalChange, gates: Gates) -> str | None:
    """The sentence of the mAP gate, from mAP in 0..1; None where the model passes."""
    drop = 100 * (reference - candidate)
    if drop <= gates.max_map_drop:
        return None
    return (
        f"mAP {100 * candidate:.2f} is {drop:.2f} points (95 % interval {-100 * change.mAP.high:.2f} to"
        f" {-100 * change.mAP.low:.2f}) below the reference's {100 * reference:.2f}, {gates.max_map_drop:g} are allowed"
    )


_LARGEST_FILE = 256 * 2**20
_REMEDY = "Write it again with pmm bench"


class _WrongError(ValueError):
    """An entry that is not what the schema says; the text names it."""


def read_report(path: Path) -> BenchReport:
    """Read what `BenchReport.save` wrote. Entries that this version does not know are left out.

    A figure that was not finite is null in the file and NaN here.

    Raises:
        DataError: the file is missing, no JSON, of another schema, or has an entry that is missing or wrong.
    """
    raw = _json_of(path)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema is None:
        raise DataError(f"{path} is no report of pmm bench: it names no schema", "Name a bench.json of this version")
    if schema != SCHEMA:
        raise DataError(f"{path} has schema {schema!r:.20}, this version of pmm-edge reads {SCHEMA}", _REMEDY)
    try:
        report: BenchReport = _read(BenchReport, raw, "")
        for model in (report.reference, *report.models):
            _check(model)
    except _WrongError as error:
        raise DataError(f"{path} cannot be read: {error}", _REMEDY) from error
    return report


def _json_of(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise DataError(f"{path} is larger than any report", "Name a bench.json")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "Name a bench.json that pmm bench wrote") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON ({error})", "Name a bench.json that pmm bench wrote") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _read(kind: Any, raw: Any, where: str) -> Any:
    """`raw` as the type `kind`, checked all the way down; `where` is its place in the file, for errors."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # only ever `X | None`
        return None if raw is None else _read(arguments[0], raw, where)
    if origin is Literal:
        if not isinstance(raw, str) or raw not in arguments:
            raise _WrongError(f"{where} is {raw!r:.40}, not one of {', '.join(map(str, arguments))}")
        return raw
    if origin is list:
        return [_read(arguments[0], entry, f"{where}[{n}]") for n, entry in enumerate(_of(list, raw, where))]
    if origin is dict:
        entries: dict[str, Any] = _of(dict, raw, where)
        return {key: _read(arguments[1], value, f"{where}[{key!r:.40}]") for key, value in entries.items()}
    if is_dataclass(kind):
        return _object(kind, _of(dict, raw, where or "the file"), f"{where}." if where else "")
    return _number(raw, where) if kind is float else _of(kind, raw, where)


def _object(kind: Any, raw: Mapping[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    values = {}
    for entry in fields(kind):
        if entry.name in raw:
            values[entry.name] = _read(types[entry.name], raw[entry.name], where + entry.name)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _WrongError(f"{where}{entry.name} is missing")
    return kind(**values)


def _of(kind: type, raw: Any, where: str) -> Any:
    # In Python a bool is an int; in the schema it is not.
    if not isinstance(raw, kind) or (kind is int and isinstance(raw, bool)):
        words = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
        raise _WrongError(f"{where} is {raw!r:.40}, not {words[kind]}")
    if isinstance(raw, int) and abs(raw) > 2**63:  # nothing that is counted; float() of it may overflow
        raise _WrongError(f"{where} is larger than anything that is counted")
    return raw


def _number(raw: Any, where: str) -> float:
    if raw is None:
        return math.nan
    if not isinstance(raw, int | float) or isinstance(raw, bool):
        raise _WrongError(f"{where} is {raw!r:.40}, not a number")
    value = float(_of(int, raw, where)) if isinstance(raw, int) else raw
    if not math.isfinite(value):  # 1e999
        raise _WrongError(f"{where} is larger than any number")
    return value


def _check(model: ModelReport) -> None:
    """What types cannot say and everything that reads a report relies on."""
    if model.parity and len(model.parity.cosine_quantiles) != QUANTILES:
        raise _WrongError(f"cosine_quantiles of {model.path} are {len(model.parity.cosine_quantiles)}, not {QUANTILES}")
    for latency in model.latency:
        if latency.batch < 1 or latency.runs < 1 or not latency.median_ms > 0:
            raise _WrongError(f"a latency of {model.path} has no batch, no runs or no time")
    if model.file_bytes < 0:
        raise _WrongError(f"file_bytes of {model.path} is negative")
