"""Calibration crops, and the ranges of a network's values on them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, create_calibrator
from onnxruntime.quantization import CalibrationMethod as Calibrator

from pmm_edge.console import Report, silent
from pmm_edge.data.checks import analyze
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, Split, read
from pmm_edge.errors import DataError, ModelError, PmmWarning
from pmm_edge.files import sha256, temporary_folder
from pmm_edge.images import Pixels, evenly, network_input, read_crops
from pmm_edge.spec import CalibrationMethod, InputSpec

METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

Ranges = dict[str, tuple[float, float]]
"""Tensor name -> smallest and largest value."""

MIN_IMAGES, MAX_IMAGES = 64, 192
"""Crops needed for calibration, and the most that are read."""

_CALIBRATORS = {
    "minmax": Calibrator.MinMax,
    "percentile": Calibrator.Percentile,
    "entropy": Calibrator.Entropy,
}
_BATCH = 4  # all values of ResNet-50 for one 384×128 image take 80 MB


@dataclass(frozen=True, eq=False)
class Calibration:
    """Crops of a data set's training split at network size, uint8 (N, height, width, 3), in three disjoint parts."""

    dataset: ReidDataset
    ranges: Pixels
    """Four of six: set activation ranges."""
    selection: Pixels
    """One of six: selects the calibration method, and ranks layers by sensitivity."""
    held_out: Pixels
    """One of six: measures the result; nothing is set or selected on them."""

    @property
    def all(self) -> Pixels:
        """The crops of all three parts."""
        return np.concatenate([self.ranges, self.selection, self.held_out])


def read_calibration(
    root: Path, spec: InputSpec, layout: str | None = None, evaluated_on: ReidDataset | None = None
) -> Calibration:
    """Read calibration crops, spread evenly over the identities of a data set's training split.

    Warns with `PmmWarning` if calibration uses people or images of the split that retrieval is evaluated on.

    Args:
        root: folder of the data set.
        spec: size of the network's input.
        layout: of the data set, if it is not detected.
        evaluated_on: the data set whose query and gallery the network will be evaluated on, if it may be another one.

    Raises:
        DataError: `root` is not a data set, has too few training images, or an image cannot be read.
    """
    try:
        dataset = read(root, layout)
    except DataError as error:
        raise DataError(
            f"--calibration {root} cannot be used: {error.problem}",
            "Name the folder of a data set; its training images are used",
        ) from error
    paths = _spread(dataset.train, MAX_IMAGES)
    if len(paths) < MIN_IMAGES:
        raise DataError(
            f"{root} has {len(paths)} training images, but calibration needs at least {MIN_IMAGES}",
            "Name another data set with --calibration",
        )
    for problem in _leaks(dataset, paths, evaluated_on):
        warnings.warn(f"calibration uses data that retrieval is evaluated on: {problem}", PmmWarning, stacklevel=2)
    crops = read_crops(paths, spec.height, spec.width)
    # The crops are in the order of the identities, so each part covers nearly all of them.
    place = np.arange(len(crops)) % 6
    return Calibration(dataset, crops[(place != 2) & (place != 5)], crops[place == 2], crops[place == 5])


def _spread(split: Split, count: int) -> list[Path]:
    """Select evenly spaced images, in the order of the identities."""
    order = [int(index) for index in np.argsort(split.pids, kind="stable") if split.pids[index] >= DISTRACTOR_PID]
    return [split.paths[order[at]] for at in evenly(len(order), count)]


def _leaks(dataset: ReidDataset, paths: Sequence[Path], evaluated_on: ReidDataset | None) -> list[str]:
    """Find calibration data that would make retrieval figures too good.

    Within a data set identities are compared. In another data set the same number may mean another person, so files are
    compared instead.
    """
    found = [warning.text for warning in analyze(dataset).warnings if warning.kind == "train-test-overlap"]
    if evaluated_on and evaluated_on.root.resolve() != dataset.root.resolve():
        shared = _shared_files(paths, evaluated_on)
        if shared:
            found.append(f"{shared} of {len(paths)} images are also in the query or gallery of {evaluated_on.root}")
    return found


def _shared_files(paths: Sequence[Path], other: ReidDataset) -> int:
    """Count the files that also are, under any name, in a data set's query or gallery."""
    sizes, digests = {path.stat().st_size for path in paths}, set()
    for path in (*other.query.paths, *other.gallery.paths):
        with suppress(OSError):  # pmm bench reports unreadable images
            if path.stat().st_size in sizes:
                digests.add(sha256(path))
    return sum(sha256(path) in digests for path in paths)


class _Once(CalibrationDataReader):
    """Feed one batch to ONNX Runtime's calibrators."""

    def __init__(self, inputs: Mapping[str, NDArray[np.generic]]) -> None:
        self._inputs: Iterator[Mapping[str, NDArray[np.generic]]] = iter([inputs])

    def get_next(self) -> Mapping[str, NDArray[np.generic]] | None:
        return next(self._inputs, None)


def value_ranges(
    network: onnx.ModelProto,
    crops: Pixels,
    spec: InputSpec,
    method: CalibrationMethod = "minmax",
    symmetric: bool = False,
    operators: Sequence[str] | None = None,
    report: Report = silent,
) -> Ranges:
    """Measure the ranges of a float32 network's values on crops.

    Args:
        network: from normalized images to embeddings (`Parts.network`).
        crops: (N, height, width, 3) uint8.
        spec: mean and standard deviation of the input.
        method: `minmax` takes the extremes, `percentile` all but the outermost of 100,000 values, `entropy` the range
            whose 8-bit histogram loses the least information.
        symmetric: return ranges symmetric around zero.
        operators: ONNX operators whose inputs and outputs to measure; None for all.

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
            calibrate_method=_CALIBRATORS[method],
            extra_options={"symmetric": symmetric},
        )
        name = str(network.graph.input[0].name)
        for start in range(0, len(crops), _BATCH):  # the calibrator keeps all values of what it is given at once
            report(what, start, len(crops))
            images = network_input(crops[start : start + _BATCH], replace(spec, form="normalized"))
            with redirect_stdout(io.StringIO()):
                calibrator.collect_data(_Once({name: images}))
        with redirect_stdout(io.StringIO()):
            found = calibrator.compute_data()
        report(what, len(crops), len(crops))
    ranges = {}
    for tensor, data in found.items():
        low, high = (float(np.asarray(end).item()) for end in data.range_value)
        if not np.isfinite((low, high)).all():
            raise ModelError(
                f"the network produces NaN or infinity at {tensor}", "Train again with a lower learning rate"
            )
        ranges[tensor] = (low, high)
    return ranges
