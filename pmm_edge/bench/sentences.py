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
from pmm_edge.errors import install
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
_FAILURES = {
    FailureKind.COSINE: "has cosine {value:.6f} on {image}, below the minimum of {limit:g}",
    FailureKind.MEAN_COSINE: "has mean cosine {value:.6f}, below the minimum of {limit:g}",
    FailureKind.LENGTH: "changes the length of the embedding of {image} by a factor of {value:.4g}, and at most"
    " {limit:.4g} or its inverse is allowed; this changes distances and every threshold on them",
    FailureKind.MAP_DROP: "loses {value:.2f} points of mAP{interval}; the maximum is {limit:g}",
    FailureKind.PRECISION: "declares another precision than it has: {percent:.0f} % of its weights are of the declared"
    " type, most are {detail}",
    FailureKind.EMBEDDING_SIZE: "outputs {value:.0f} values per embedding, the reference {limit:.0f}",
    FailureKind.CANNOT_RUN: "cannot be run: {detail}",
    FailureKind.INVARIANT: "breaks the invariant '{invariant.name.value}': {broken}",
}
_WARNINGS = {
    WarningKind.NO_IDENTITIES: "retrieval is not evaluated: the images have no identities",
    WarningKind.LIMITED: "retrieval is not evaluated: it needs all {total:,} images, and {count:,} were used",
    WarningKind.PRECISION_NOT_CHECKED: "the declared precisions were not checked, because the onnx package"
    f" is missing. {install('train')}",
    WarningKind.REFERENCE_BROKEN: "the reference {name} fails its own checks, so that no model was compared with it",
    WarningKind.SAME_FILE: "{name} is the same file as the reference, so that the comparison shows nothing",
    WarningKind.NOT_MEASURED: "{about}{detail}",
    WarningKind.BUSY: "the machine was busy before the measurement: load {value:.1f}, at most {limit:.1f} is quiet;"
    " stop other processes (see top) and measure again",
    WarningKind.NOISY: "{count} of {total} timings are noisy: the standard deviation reaches {percent:.0f} % of the"
    " mean (quiet machines stay below {limit_percent:.0f} %); stop other processes and lock the clocks (jetson_clocks,"
    " or cpupower frequency-set -g performance). On a VM, other tenants add noise",
    WarningKind.THROTTLED: "the machine slowed down during the measurement ({reasons}); cool it or lock lower clocks",
}


def describe_failure(failure: Failure) -> str:
    """Describe a failed gate; the sentence follows the model's name."""
    value, change, invariant = failure.value or 0.0, failure.change, failure.invariant
    interval = f" (95 % interval {-100 * change.high:.2f} to {-100 * change.low:.2f})" if change else ""
    fields = vars(failure) | {"value": value, "percent": 100 * value, "interval": interval}
    return _FAILURES[failure.kind].format(**fields, broken=_describe_invariant(invariant) if invariant else "")


def _describe_invariant(invariant: Invariant) -> str:
    count = f"{invariant.images:,} images"
    if invariant.name is InvariantName.FINITE:
        return f"NaN or infinity for {count}, first for {invariant.image}"
    if invariant.name is InvariantName.DISTINCT:
        if not invariant.other_image:
            return f"the embedding is all zeros for {count}, first for {invariant.image}"
        return f"{count} have the same embedding, such as {invariant.image} and {invariant.other_image}"
    if invariant.name is InvariantName.UNIT_LENGTH:
        return f"length {invariant.value:.4g} instead of 1 on {invariant.image}, tolerance {invariant.tolerance:g}"
    found = "NaN or infinity" if invariant.value is None else f"a difference of {invariant.value:.2g}"
    where = f" next to {invariant.neighbors}" if invariant.neighbors else ""
    batch = f"in row {invariant.row} of a batch of {invariant.batch}{where}"
    return f"{found} {batch} ({invariant.image}); tolerance {invariant.tolerance:g}"


def describe_cause(likely: LikelyCause) -> str:
    """Describe a likely cause."""
    return CAUSES[likely.cause] + (f" ({', '.join(likely.stages)})" if likely.stages else "")


def describe_departure(departure: Departure) -> str:
    """Describe where a model departs from the reference, and why where that is known."""
    what = f"{departure.operator} '{departure.layer or departure.node}'"
    figures = f"output cosine {departure.cosine:.4f}, inputs {departure.before:.4f}"
    why, own, reference = "", departure.value_range, departure.reference_range
    if own is None:
        largest = max(map(abs, reference or (0.0,)))
        why = ": the output holds NaN or infinity"
        if departure.dtype == "float16" and largest > FLOAT16_MAX:
            why = f": the reference reaches {largest:.4g}, which exceeds the range of float16 ({FLOAT16_MAX:.0f})"
    elif departure.operator == "DequantizeLinear" and reference:
        why = f": INT8 represents {own[0]:.3g} to {own[1]:.3g}, the reference has {reference[0]:.3g} to"
        why += f" {reference[1]:.3g}; calibrate on real crops"
    elif departure.weights_changed:
        why = f": its weights differ from the reference (cosine {departure.weights_cosine:.4f})"
    if departure.gradual:
        return f"no single node is at fault, the difference accumulates; {what} loses most ({figures}){why}"
    return f"departs at {what} ({figures}){why}"


def describe_warning(warning: BenchWarning) -> str:
    """Describe a warning and what to do about it."""
    name, value, limit = Path(warning.model).name, warning.value or 0.0, warning.limit or 0.0
    reasons = [f"the processor {warning.count} times"] if warning.count else []
    reasons += [f"the GPU because of its {reason.value}" for reason in warning.slowed_by]
    fields = vars(warning) | {"value": value, "limit": limit, "percent": 100 * value, "limit_percent": 100 * limit}
    fields |= {"name": name, "about": f"{name}: " if name else "", "reasons": ", ".join(reasons)}
    return _WARNINGS[warning.kind].format(**fields)
