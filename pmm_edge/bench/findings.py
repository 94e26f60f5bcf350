"""The figures of one model in two reports, each with how much it may differ by chance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pmm_edge.bench import noise
from pmm_edge.bench.figures import Latency, ModelReport
from pmm_edge.bench.quiet import MOST_VARIATION
from pmm_edge.bench.tables import milliseconds

Way = Literal["worse", "better", "same", "unknown"]
Pair = tuple[ModelReport, ModelReport]
"""The old one and the new one."""


@dataclass(frozen=True)
class Finding:
    """One figure of one model in both reports."""

    model: str
    figure: str
    old: str
    new: str
    change: str
    """With its unit: `-0.31 points`, `x1.20`."""
    noise: str
    """The change that may be none: `± 0.25 points`."""
    way: Way

    @property
    def sentence(self) -> str:
        words = {"worse": "became worse", "better": "became better", "same": "is as it was"}
        became = words.get(self.way, "cannot be compared")
        return f"{self.model}: {self.figure} {became}: {self.old} -> {self.new} ({self.change}, noise {self.noise})"


def accuracy(name: str, pair: Pair, same_reference: bool) -> Iterator[Finding]:
    """Retrieval and cosine; both reports must be of the same images. A gate that was loosened makes no more of noise.

    The intervals are of the model less its reference: with another reference only that difference is compared.
    """
    old, new = pair
    for word, entry in (("mAP", "mAP"), ("Rank-1", "rank1"), ("mINP", "mINP")):
        # None for a reference, which has no change: getattr gives the default of an entry that None lacks.
        changes = [getattr(model.retrieval_change, entry, None) for model in pair]
        allowed = noise.points_noise(changes[0], changes[1])
        if same_reference and old.retrieval and new.retrieval:
            values = [100 * float(getattr(model.retrieval, entry)) for model in pair]
            yield _points(name, word, values, allowed, ".2f")
        elif not same_reference and changes[0] and changes[1]:
            differences = [100 * float(change.difference) for change in (changes[0], changes[1])]
            yield _points(name, f"{word} less the reference's", differences, allowed, "+.2f")
    if old.parity and new.parity and old.parity.images == new.parity.images:
        before, now = old.parity.whole, new.parity.whole
        least_gate, mean_gate = (
            max(getattr(m.gates, entry) for m in pair) for entry in ("min_cosine", "min_mean_cosine")
        )
        yield _cosine(name, "least cosine", before.cosine_min, now.cosine_min, least_gate)
        yield _cosine(name, "mean cosine", before.cosine_mean, now.cosine_mean, max(mean_gate, least_gate))


def _points(name: str, figure: str, values: list[float], allowed: float, form: str) -> Finding:
    """The old and the new share in points of 100, shown in this form: more is better."""
    old, new = values
    moved = new - old
    way: Way = "same" if abs(moved) <= allowed else "better" if moved > 0 else "worse"
    return Finding(
        name, figure, f"{old:{form}}", f"{new:{form}}", f"{moved:+.2f} points", f"± {allowed:.2f} points", way
    )


def _cosine(name: str, figure: str, old: float, new: float, gate: float) -> Finding:
    way: Way = "same"
    if noise.cosine_is_worse(old, new, gate):
        way = "worse"
    elif noise.cosine_is_worse(new, old, gate):
        way = "better"
    change = f"1-c {1 - old:.0e} -> {1 - new:.0e}"
    return Finding(name, figure, f"{old:.6f}", f"{new:.6f}", change, f"x2, to {(1 - gate) / 10:.0e}", way)


def times(name: str, pair: Pair) -> Iterator[Finding]:
    """Medians and p90 as they are: the machine is the same."""
    for what, first, second in _latencies(pair):
        allowed = noise.latency_noise(first, second)
        yield _share(name, f"{what}, ms", first.median_ms, second.median_ms, allowed)
        yield _p90(name, f"{what}, p90 ms", first, second)
    old, new = pair
    if old.cold_start and new.cold_start:
        starts = old.cold_start.first_embedding_ms, new.cold_start.first_embedding_ms
        yield _share(name, "first embedding, ms", *starts, noise.COLD_START)
    if old.stream and new.stream and old.stream.clients == new.stream.clients:
        rates = old.stream.crops_per_second, new.stream.crops_per_second
        yield _share(name, f"{new.stream.clients} clients, crops a second", *rates, noise.STREAM, more_is_better=True)
    if old.energy and new.energy and (old.energy.source, old.energy.batch) == (new.energy.source, new.energy.batch):
        joules = old.energy.joules_per_embedding, new.energy.joules_per_embedding
        yield _share(name, "J an embedding", *joules, noise.ENERGY)


def _p90(name: str, figure: str, old: Latency, new: Latency) -> Finding:
    """Timings that the bench itself calls noisy show no change of their tail."""
    found = _share(name, figure, old.p90_ms, new.p90_ms, noise.p90_noise(old, new))
    variation = max(old.variation, new.variation)
    if found.way == "same" or variation <= MOST_VARIATION:
        return found
    return replace(found, noise=f"varies by {100 * variation:.0f} %", way="unknown")


def ratios(name: str, pair: Pair) -> Iterator[Finding]:
    """On another machine only what the reference took there can be compared with."""
    for what, first, second in _latencies(pair):
        if (first.ratio, second.ratio) != (1, 1):  # the reference's own
            allowed = noise.ratio_noise(first, second)
            yield _share(name, f"{what}, ratio to the reference", first.ratio, second.ratio, allowed)


def sizes(name: str, pair: Pair, same_machine: bool) -> Iterator[Finding]:
    """The file's size; on the same machine the memory as well."""
    old, new = pair
    yield _share(name, "file, MiB", old.file_bytes / 2**20, new.file_bytes / 2**20, noise.FILE_SIZE)
    starts = old.cold_start, new.cold_start
    if same_machine and starts[0] and starts[1] and starts[0].batch == starts[1].batch:
        memory = starts[0].peak_memory_mib, starts[1].peak_memory_mib
        yield _share(name, "peak memory, MiB", *memory, noise.MEMORY)
        gpu = starts[0].peak_gpu_memory_mib, starts[1].peak_gpu_memory_mib
        if gpu[0] is not None and gpu[1] is not None:
            yield _share(name, "peak GPU memory, MiB", gpu[0], gpu[1], noise.MEMORY)


def _share(name: str, figure: str, old: float, new: float, allowed: float, more_is_better: bool = False) -> Finding:
    """A figure whose noise is a share of it. The bounds are x(1 + share) and its inverse: neither way is easier."""
    if not (old > 0 and new > 0):
        return Finding(name, figure, _short(old), _short(new), "not finite or none", "–", "unknown")
    factor = new / old
    up = factor > 1 + allowed
    way: Way = "same" if 1 / (1 + allowed) <= factor <= 1 + allowed else "better" if up == more_is_better else "worse"
    return Finding(name, figure, _short(old), _short(new), f"x{factor:.2f}", f"± {100 * allowed:.0f} %", way)


def _latencies(pair: Pair) -> Iterator[tuple[str, Latency, Latency]]:
    old = {(own.scope, own.batch, own.cuda_graph): own for own in pair[0].latency}
    for own in pair[1].latency:
        if found := old.get((own.scope, own.batch, own.cuda_graph)):
            scope = "" if own.scope == "model" else ", end to end"
            yield f"batch {own.batch}{scope}{', CUDA graph' if own.cuda_graph else ''}", found, own


def _short(value: float) -> str:
    return f"{value:.3g}" if 0 < abs(value) < 1 else milliseconds(value)
