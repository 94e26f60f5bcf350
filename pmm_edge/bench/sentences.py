"""Sentences for people, made from the fields of a report. Nothing in the program decides by them."""

from __future__ import annotations

from pathlib import Path

from pmm_edge.bench.report import (
    BenchWarning,
    Cause,
    Departure,
    Failure,
    FailureKind,
    Invariant,
    InvariantName,
    LikelyCause,
    WarningKind,
)
from pmm_edge.spec import FLOAT16_MAX

CAUSES = {
    Cause.BGR: "the model receives BGR instead of RGB",
    Cause.BGR_AFTER_NORMALIZATION: "red and blue are swapped after normalization",
    Cause.NORMALIZED_TWICE: "the input is normalized twice",
    Cause.NORMALIZED_AND_SCALED_TWICE: "the input is normalized twice, including the scaling to 0..1",
    Cause.NOT_NORMALIZED_UNIT: "normalization is missing: the network receives values in 0..1",
    Cause.NOT_NORMALIZED_RAW: "normalization is missing: the network receives values in 0..255",
    Cause.NORMALIZED_SYMMETRICALLY: "the input is normalized to -1..1",
    Cause.MEAN_MISSING: "the mean is not subtracted",
    Cause.STD_MISSING: "the input is not divided by the standard deviation",
    Cause.SCALING_MISSING: "the scaling to 0..1 before normalization is missing",
    Cause.SCALED_TWICE: "the input is scaled to 0..1 twice",
    Cause.MIRRORED: "images are mirrored",
    Cause.UPSIDE_DOWN: "images are upside down",
    Cause.NHWC_AS_NCHW: "NHWC pixels are read as NCHW",
    Cause.STAGES_SWAPPED: "the stages of the embedding are swapped",
    Cause.STAGES_NORMALIZED: "each stage is normalized to unit length, instead of the whole embedding",
    Cause.FLOAT16_OVERFLOW: f"values exceed the range of float16 ({FLOAT16_MAX:.0f})",
    Cause.OTHER_CHECKPOINT: "the model was exported from a different checkpoint than the reference",
}


def describe_failure(failure: Failure) -> str:
    """Describe a failed gate; the sentence follows the model's name."""
    value, limit = failure.value or 0.0, failure.limit or 0.0
    if failure.kind is FailureKind.COSINE:
        return f"has cosine {value:.6f} on {failure.image}, below the minimum of {limit:g}"
    if failure.kind is FailureKind.MEAN_COSINE:
        return f"has mean cosine {value:.6f}, below the minimum of {limit:g}"
    if failure.kind is FailureKind.LENGTH:
        return (
            f"changes the length of embeddings: that of {failure.image} is {value:.4g} times the reference's, and"
            f" {1 / limit:.4g} to {limit:.4g} is allowed; this changes distances and every threshold on them"
        )
    if failure.kind is FailureKind.MAP_DROP:
        return f"loses {value:.2f} points of mAP{_interval(failure)}; the maximum is {limit:g}"
    if failure.kind is FailureKind.PRECISION:
        held = f"{100 * value:.0f} % of its weights are"
        return f"declares another precision than it has: {held} of the declared type, most are {failure.detail}"
    if failure.kind is FailureKind.EMBEDDING_SIZE:
        return f"outputs {value:.0f} values per embedding, the reference {limit:.0f}"
    if failure.kind is FailureKind.CANNOT_RUN:
        return f"cannot be run: {failure.detail}"
    assert failure.invariant is not None
    return f"breaks the invariant '{failure.invariant.name.value}': {describe_invariant(failure.invariant)}"


def describe_invariant(invariant: Invariant) -> str:
    """Describe what the check of an invariant found."""
    name, count = invariant.name, f"{invariant.images:,} images"
    if name is InvariantName.FINITE:
        return "no NaN or infinity" if invariant.held else f"NaN or infinity for {count}, first for {invariant.image}"
    if name is InvariantName.DISTINCT:
        if invariant.held:
            return "different images have different embeddings"
        if not invariant.other_image:
            return f"the embedding is all zeros for {count}, first for {invariant.image}"
        return f"{count} have the same embedding, such as {invariant.image} and {invariant.other_image}"
    if name is InvariantName.UNIT_LENGTH:
        return f"length {invariant.value:.4g} instead of 1 on {invariant.image}, tolerance {invariant.tolerance:g}"
    found = "NaN or infinity" if invariant.value is None else f"a difference of {invariant.value:.2g}"
    where = f" next to {invariant.neighbors}" if invariant.neighbors else ""
    return (
        f"{found} in row {invariant.row} of a batch of {invariant.batch}{where} ({invariant.image});"
        f" tolerance {invariant.tolerance:g}"
    )


def describe_cause(likely: LikelyCause) -> str:
    """Describe a likely cause."""
    order = f" ({', '.join(likely.stages)})" if likely.stages else ""
    return CAUSES[likely.cause] + order


def describe_departure(departure: Departure) -> str:
    """Describe where a model departs from the reference, and why where that is known."""
    what = f"{departure.operator} '{departure.layer or departure.node}'"
    figures = f"output cosine {departure.cosine:.4f}, inputs {departure.before:.4f}"
    why = _reason(departure)
    if departure.gradual:
        return f"no single node is at fault, the difference accumulates; {what} loses most ({figures}){why}"
    return f"departs at {what} ({figures}){why}"


def _reason(departure: Departure) -> str:
    if departure.value_range is None:
        largest = max(map(abs, departure.reference_range or (0.0,)))
        if departure.dtype == "float16" and largest > FLOAT16_MAX:
            return f": the reference reaches {largest:.4g}, which exceeds the range of float16 ({FLOAT16_MAX:.0f})"
        return ": the output holds NaN or infinity"
    if departure.operator == "DequantizeLinear" and departure.reference_range:
        (low, high), (true_low, true_high) = departure.value_range, departure.reference_range
        return (
            f": INT8 represents {low:.3g} to {high:.3g}, the reference has {true_low:.3g} to {true_high:.3g};"
            " calibrate on real crops"
        )
    if departure.weights_changed:
        return f": its weights differ from the reference (cosine {departure.weights_cosine:.4f})"
    return ""


def describe_warning(warning: BenchWarning) -> str:
    """Describe a warning and what to do about it."""
    name = Path(warning.model).name
    value, limit = warning.value or 0.0, warning.limit or 0.0
    count, total = warning.count or 0, warning.total or 0
    if warning.kind is WarningKind.NO_IDENTITIES:
        return "retrieval is not evaluated: the images have no identities"
    if warning.kind is WarningKind.LIMITED:
        return f"retrieval is not evaluated: it needs all {total:,} images, and {count:,} were used"
    if warning.kind is WarningKind.PRECISION_NOT_CHECKED:
        return "the declared precisions were not checked: install the onnx package (pip install 'pmm-edge[train]')"
    if warning.kind is WarningKind.REFERENCE_BROKEN:
        return f"the reference {name} fails its own checks, so that no model was compared with it"
    if warning.kind is WarningKind.SAME_FILE:
        return f"{name} is the same file as the reference, so that the comparison shows nothing"
    if warning.kind is WarningKind.UNIT_LENGTH:
        figures = f" (mAP of the reference {100 * value:.2f}, without {100 * limit:.2f})" if warning.value else ""
        return f"only one of {name} and the reference outputs unit-length embeddings: both were normalized{figures}"
    if warning.kind is WarningKind.FEW_QUERIES:
        return (
            f"{count} models pass the mAP gate on these {total:,} queries, which are too few to show it for others: the"
            f" loss may be up to {value:.2f} points (95 % interval) where {limit:g} is allowed; evaluate more queries"
        )
    if warning.kind is WarningKind.NOT_MEASURED:
        return f"{name}: {warning.detail}" if name else warning.detail
    if warning.kind is WarningKind.BUSY:
        return (
            f"the machine was busy before the measurement: load {value:.1f}, at most {limit:.1f} is quiet; stop other"
            " processes (see top) and measure again"
        )
    if warning.kind is WarningKind.NOISY:
        return (
            f"{count} of {total} timings are noisy: the standard deviation reaches {100 * value:.0f} % of the mean"
            f" (quiet machines stay below {100 * limit:.0f} %); stop other processes and lock the clocks"
            " (jetson_clocks, or cpupower frequency-set -g performance). On a VM, other tenants add noise"
        )
    reasons = [f"the GPU because of its {reason.value}" for reason in warning.slowed_by]
    events = [f"the processor {count} times"] if count else []
    return (
        f"the machine slowed down during the measurement ({', '.join(events + reasons)}); cool it or lock lower clocks"
    )


def _interval(failure: Failure) -> str:
    change = failure.change
    return f" (95 % interval {-100 * change.high:.2f} to {-100 * change.low:.2f})" if change else ""
