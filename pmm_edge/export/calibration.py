"""Real crops that a lower precision is made and judged with, and the ranges of the network's values on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

from pmm_edge.console import Report, silent
from pmm_edge.data.checks import analyze
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split, read
from pmm_edge.errors import DataError, ModelError
from pmm_edge.export.options import Method
from pmm_edge.files import sha256, temporary_folder
from pmm_edge.images import Pixels, evenly, network_input, read_crops
from pmm_edge.spec import InputSpec

METHODS: tuple[Method, ...] = get_args(Method)
Ranges = dict[str, tuple[float, float]]
"""Tensor name -> its least and its largest value."""

MIN_IMAGES = 64
IMAGES = 192
"""Crops that are read; of each six, four calibrate, one chooses and one judges."""

_CYCLE, _CHOOSES, _JUDGES = 6, 2, 5

_Inputs = Mapping[str, NDArray[np.float32] | NDArray[np.uint8]]
_KIND = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
_BATCH = 4  # all values of ResNet-50 for one image of 384×128 take 80 MB


@dataclass(frozen=True, eq=False)
class Calibration:
    """Crops of a data set's training split, at network size."""

    dataset: ReidDataset
    crops: Pixels
    """(N, height, width, 3) uint8 that set ranges."""
    choosing: Pixels
    """(M, height, width, 3) uint8 that the method of calibration and the layers in float are chosen on."""
    judging: Pixels
    """(L, height, width, 3) uint8 that neither set nor chose anything: what came of it is told on them."""
    warnings: list[str]

    @property
    def everything(self) -> Pixels:
        """(N + M + L, height, width, 3) uint8."""
        return np.concatenate([self.crops, self.choosing, self.judging])


def read_calibration(
    root: Path, spec: InputSpec, layout: str | None = None, judged_on: ReidDataset | None = None
) -> Calibration:
    """Read crops, spread over the identities of a data set's training split, in three parts that share no image.

    Args:
        root: the data set's folder.
        spec: of the network's input.
        layout: the data set's, where it is not recognised.
        judged_on: the data set whose query and gallery will judge the network, where it may be another one.

    Raises:
        DataError: `root` is no data set, has too few training images, or one cannot be read.
    """
    try:
        dataset = read(root, layout)
    except DataError as error:
        raise DataError(
            f"--calibration {root} cannot be used: {error.problem}",
            "Name a data set's own folder; its training images calibrate",
        ) from error
    paths = _spread(dataset.train, IMAGES)
    if len(paths) < MIN_IMAGES:
        raise DataError(
            f"{root} has {len(paths)} training images, calibration needs {MIN_IMAGES} or more",
            "Name another data set with --calibration",
        )
    crops = read_crops(paths, spec.height, spec.width)
    # In the order of the identities: each part sees nearly all of them.
    place = np.arange(len(crops)) % _CYCLE
    choosing, judging = place == _CHOOSES, place == _JUDGES
    calibrating = ~(choosing | judging)
    return Calibration(
        dataset, crops[calibrating], crops[choosing], crops[judging], _wrong_people(dataset, paths, judged_on)
    )


def value_ranges(
    network: onnx.ModelProto,
    crops: Pixels,
    spec: InputSpec,
    method: Method = "minmax",
    symmetric: bool = False,
    operators: Sequence[str] | None = None,
    report: Report = silent,
) -> Ranges:
    """Run a float32 network on crops with all its values exposed.

    Args:
        network: from normalised images to embeddings (`Parts.network`).
        crops: (N, height, width, 3) uint8.
        method: how a range is told from the values: their extremes, all but the outermost of 100,000, or the one
            whose histogram loses least information in 8 bits.
        symmetric: for quantisation around zero.
        operators: whose inputs and outputs are wanted; None for all.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    what = f"calibrating, {method}"
    with temporary_folder() as folder:
        source = folder / "network.onnx"
        onnx.save(network, source)
        calibrator = create_calibrator(
            source,
            operators,
            str(folder / "augmented.onnx"),
            calibrate_method=_KIND[method],
            extra_options={"symmetric": symmetric},
        )
        name = str(network.graph.input[0].name)
        for start in range(0, len(crops), _BATCH):
            report(what, start, len(crops))
            images = network_input(crops[start : start + _BATCH], replace(spec, form="normalized"))
            with redirect_stdout(io.StringIO()):  # it prints what `report` says
                # A few at a time: it keeps all values of what it is given.
                calibrator.collect_data(_Once({name: images}))
        with redirect_stdout(io.StringIO()):
            found = calibrator.compute_data()
        report(what, len(crops), len(crops))
    ranges = {}
    for tensor, data in found.items():
        low, high = (float(np.asarray(end).item()) for end in data.range_value)
        if not np.isfinite((low, high)).all():
            raise ModelError(f"the network gives NaN or infinity at {tensor}", "Train again, at a lower learning rate")
        ranges[tensor] = (low, high)
    return ranges


class _Once(CalibrationDataReader):
    """One batch, as ONNX Runtime's calibrators ask for it."""

    def __init__(self, inputs: _Inputs) -> None:
        self._inputs: Iterator[_Inputs] = iter([inputs])

    def get_next(self) -> _Inputs | None:
        return next(self._inputs, None)


def _spread(split: Split, count: int) -> list[Path]:
    """Images at even distances, in the order of the identities."""
    order = [int(index) for index in np.argsort(split.pids, kind="stable") if split.pids[index] >= DISTRACTOR_PID]
    return [split.paths[order[at]] for at in evenly(len(order), count)]


def _wrong_people(dataset: ReidDataset, paths: Sequence[Path], judged_on: ReidDataset | None) -> list[str]:
    """What makes a figure on query and gallery too good.

    Within a data set an identity is a number. Another data set gives the same numbers to other people, so against
    that the files themselves are compared.
    """
    findings = [found.text for found in analyze(dataset).warnings if found.kind == "train-test-overlap"]
    if judged_on and judged_on.root.resolve() != dataset.root.resolve():
        shared = _shared_files(paths, judged_on)
        if shared:
            findings.append(
                f"{shared} of the {len(paths)} calibration images are also in the query or gallery of {judged_on.root}"
            )
    return [f"calibration has seen people that retrieval is judged on: {text}" for text in findings]


def _shared_files(paths: Sequence[Path], other: ReidDataset) -> int:
    """How many of the files are, under whatever name, in a data set's query or gallery too."""
    sizes, digests = {path.stat().st_size for path in paths}, set()
    for path in (*other.query.paths, *other.gallery.paths):
        with suppress(OSError):  # what cannot be read judges nothing: pmm bench says so
            if path.stat().st_size in sizes:
                digests.add(sha256(path))
    return sum(sha256(path) in digests for path in paths)
