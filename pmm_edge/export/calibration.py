"""Calibration crops, and the ranges of a network's values on them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, create_calibrator
from onnxruntime.quantization import CalibrationMethod as Calibrator

from pmm_edge.console import Report, silent
from pmm_edge.data.checks import DatasetWarningKind, analyze
from pmm_edge.data.dataset import DISTRACTOR_PID, ReidDataset, read
from pmm_edge.errors import DataError, ModelError, PmmWarning
from pmm_edge.files import temporary_folder
from pmm_edge.images import Pixels, evenly, network_input, read_crops
from pmm_edge.spec import CalibrationMethod, InputSpec

METHODS: tuple[CalibrationMethod, ...] = get_args(CalibrationMethod)

Ranges = dict[str, tuple[float, float]]
"""Tensor name -> smallest and largest value."""

MIN_IMAGES, MAX_IMAGES = 64, 192
"""Crops needed for calibration, and the most that are read."""

_CALIBRATORS = {"minmax": Calibrator.MinMax, "percentile": Calibrator.Percentile, "entropy": Calibrator.Entropy}
_BATCH = 4  # all values of ResNet-50 for one 384×128 image take 80 MB


@dataclass(frozen=True, eq=False)
class Calibration:
    """Crops of a data set's training split at network size, uint8 (N, height, width, 3), in three disjoint parts."""

    dataset: ReidDataset
    ranges: Pixels
    """Four of six crops, which set activation ranges."""
    selection: Pixels
    """One of six, which select the calibration method and rank layers by sensitivity."""
    held_out: Pixels
    """One of six, which measure the result; nothing is set or selected on them."""

    @property
    def all(self) -> Pixels:
        return np.concatenate([self.ranges, self.selection, self.held_out])


def read_calibration(root: Path, spec: InputSpec, layout: str | None = None) -> Calibration:
    """Read calibration crops, spread evenly over the identities of the training split of the data set in `root`.

    Warns with `PmmWarning` if people of the training split are also in query or gallery. Raises DataError if `root` is
    not a data set or has too few training images, or an image cannot be read.
    """
    try:
        dataset = read(root, layout)
    except DataError as error:
        raise DataError(
            f"--calibration {root} cannot be used: {error.problem}",
            "Name the folder of a data set; its training images are used",
        ) from error
    train = dataset.train
    people = [int(index) for index in np.argsort(train.pids, kind="stable") if train.pids[index] >= DISTRACTOR_PID]
    paths = [train.paths[people[place]] for place in evenly(len(people), MAX_IMAGES)]
    if len(paths) < MIN_IMAGES:
        raise DataError(
            f"{root} has {len(paths)} training images, but calibration needs at least {MIN_IMAGES}",
            "Name another data set with --calibration",
        )
    for found in analyze(dataset).warnings:
        if found.kind is DatasetWarningKind.TRAIN_TEST_OVERLAP:
            text = f"calibration uses people that retrieval is evaluated on: {found.text}"
            warnings.warn(text, PmmWarning, stacklevel=2)
    crops = read_crops(paths, spec.height, spec.width)
    # The crops are in the order of the identities, so each part covers nearly all of them.
    place = np.arange(len(crops)) % 6
    return Calibration(dataset, crops[(place != 2) & (place != 5)], crops[place == 2], crops[place == 5])


class _Once(CalibrationDataReader):
    """Feed one batch to ONNX Runtime's calibrators."""

    def __init__(self, inputs: dict[str, NDArray[np.generic]]) -> None:
        self._inputs = iter([inputs])

    def get_next(self) -> dict[str, NDArray[np.generic]] | None:
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
    """Measure the ranges of the values of a float32 `Parts.network` on (N, height, width, 3) uint8 crops.

    `minmax` takes the extremes, `percentile` all but the outermost of 100,000 values, `entropy` the range whose 8-bit
    histogram loses the least information; `symmetric` makes them symmetric around zero. `operators` are the ONNX
    operators whose inputs and outputs to measure, None for all. Raises ModelError if a value is NaN or infinite.
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
