"""A bench while it runs: what was asked, the models, and what is known of them so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from pmm_edge.bench.environment import environment
from pmm_edge.bench.figures import (
    BenchReport,
    ColdStart,
    Compute,
    Departure,
    Energy,
    Gates,
    Invariant,
    Latency,
    ModelReport,
    Parity,
    RetrievalChange,
    Stream,
)
from pmm_edge.bench.gates import AskedGates
from pmm_edge.bench.images import BenchImages
from pmm_edge.bench.quiet import MachineState
from pmm_edge.errors import PmmError
from pmm_edge.files import sha256
from pmm_edge.images import read_crops
from pmm_edge.retrieval import RetrievalResult
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.crops import Pixels
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.spec import RetrievalFigures


@dataclass(frozen=True)
class Options:
    """What is asked of a bench.

    Raises:
        PmmError: a batch size or a number of clients below 1.
    """

    batches: tuple[int, ...] = (1, 8)
    """Sizes to time, and to hold against a batch of one, in their order; one that is named twice counts once."""
    gates: AskedGates = field(default_factory=AskedGates)
    limit: int | None = None
    """Compare this many images, spread evenly; retrieval is judged on all images or not at all."""
    device: str | None = None
    """For all models; see `pmm_edge.load`."""
    layout: str | None = None
    """Of the data set, where it is not recognised by itself."""
    explain: bool = False
    """Find the layer where a failing ONNX model departs."""
    speed: bool = True
    """Measure latency, start, memory and energy; False proves parity alone."""
    clients: int | None = None
    """Measure a stream of single crops from this many clients at once as well."""

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise PmmError("batch sizes must be 1 or more", "Choose such as --batch 1,8")
        if self.clients is not None and self.clients < 1:
            raise PmmError(f"{self.clients} clients send nothing", "Choose 1 or more, such as --concurrency 8")
        object.__setattr__(self, "batches", tuple(dict.fromkeys(self.batches)))


class Subject:
    """A model under comparison, and what is known of it so far."""

    def __init__(self, embedder: Embedder, asked: AskedGates) -> None:
        self.embedder = embedder
        self.sha256 = sha256(embedder.path)
        self.gates: Gates = asked.of(embedder.spec.precision)
        self.embeddings: Embeddings | None = None
        self.found: RetrievalResult | None = None
        self.invariants: list[Invariant] = []
        self.failures: list[str] = []
        self.parity: Parity | None = None
        self.change: RetrievalChange | None = None
        self.likely_cause: str | None = None
        self.departure: Departure | None = None
        self.latency: list[Latency] = []
        self.stream: Stream | None = None
        self.cold_start: ColdStart | None = None
        self.compute: Compute | None = None
        self.energy: Energy | None = None

    @property
    def name(self) -> str:
        return self.embedder.path.name

    @property
    def retrieval(self) -> RetrievalFigures | None:
        return self.found.figures() if self.found else None

    def report(self) -> ModelReport:
        model = self.embedder
        return ModelReport(
            path=str(model.path),
            sha256=self.sha256,
            file_bytes=model.path.stat().st_size,
            precision=model.spec.precision,
            embedding_size=model.spec.embedding_size,
            backend=model.backend,
            device=model.device,
            gates=self.gates,
            invariants=self.invariants,
            parity=self.parity,
            retrieval=self.retrieval,
            cmc=[float(share) for share in self.found.cmc] if self.found else [],
            retrieval_change=self.change,
            latency=sorted(self.latency, key=lambda one: (one.scope != "model", one.cuda_graph, one.batch)),
            failures=self.failures,
            likely_cause=self.likely_cause,
            departure=self.departure,
            stream=self.stream,
            cold_start=self.cold_start,
            compute=self.compute,
            energy=self.energy,
        )


class Run:
    """One bench while it runs."""

    def __init__(self, subjects: list[Subject], images: BenchImages, options: Options, before: MachineState) -> None:
        self.base, *self.others = subjects
        self.before = before
        self.all = subjects
        self.images, self.options = images, options
        self.data_sha256 = ""
        self.warnings = [images.why_no_retrieval] if images.why_no_retrieval else []
        self.complete = False

    @property
    def sound(self) -> list[Subject]:
        """The models that run at all."""
        return [subject for subject in self.all if subject.embeddings is not None]

    def crops(self, subject: Subject, rows: Sequence[int]) -> Pixels:
        """Some of the images at a model's size, (N, height, width, 3) uint8."""
        size = subject.embedder.spec.input
        return read_crops([self.images.paths[row] for row in rows], size.height, size.width)

    def first_rows(self, count: int) -> range:
        """The first images, at most so many."""
        return range(min(count, len(self.images.paths)))

    def report(self) -> BenchReport:
        return BenchReport(
            reference=self.base.report(),
            models=[other.report() for other in self.others],
            data=str(self.images.source),
            data_sha256=self.data_sha256,
            images=len(self.images.paths),
            environment=environment(
                [one.embedder for one in self.all], self.before, [t for s in self.all for t in s.latency]
            ),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            complete=self.complete,
            warnings=self.warnings,
        )
