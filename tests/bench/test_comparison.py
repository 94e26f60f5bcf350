"""A good export passes the bench; broken ones do not, and the sentence says what is wrong."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pmm_edge.bench import BenchReport, Gates, bench, comparison, measure_latency
from pmm_edge.bench.report import latency_rows, parity_rows
from pmm_edge.errors import PmmError

Constants = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "measure_latency", partial(measure_latency, min_runs=2, min_seconds=0))


def altered(source: Path, out: Path, alter: Callable[[Constants, onnx.GraphProto], None]) -> Path:
    """Copy an export with other constants."""
    model = onnx.load(source)
    constants = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    alter(constants, model.graph)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(constants[tensor.name], tensor.name))
    onnx.save(model, out)
    return out


def constants_of(graph: onnx.GraphProto, operator: str, constants: Constants) -> list[str]:
    """Names of the constants that the first node of this kind reads."""
    node = next(node for node in graph.node if node.op_type == operator)
    return [name for name in node.input if name in constants]


def shift_mean(constants: Constants, graph: onnx.GraphProto) -> None:
    (name,) = constants_of(graph, "Add", constants)
    constants[name] += 1.5


def swap_to_bgr(constants: Constants, graph: onnx.GraphProto) -> None:
    for operator, axis in (("Mul", 0), ("Add", 0), ("Conv", 1)):
        name = constants_of(graph, operator, constants)[0]
        constants[name] = np.flip(constants[name], axis).copy()


def give_nan(constants: Constants, graph: onnx.GraphProto) -> None:
    constants[constants_of(graph, "Gemm", constants)[1]][0] = np.nan


def run(models: list[Path], reference: Path, data: Path, limit: int | None = None) -> BenchReport:
    return bench(models, reference, data, batches=(1, 2), limit=limit, device="cpu")


def test_a_good_export_passes(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    report = run([tiny_onnx], tiny_checkpoint, tiny_dataset)
    assert report.failures == []
    (model,) = report.models
    assert model.parity is not None
    assert model.parity.cosine_min > 0.999999
    assert model.retrieval == report.reference.retrieval is not None
    assert [latency.batch for latency in model.latency] == [1, 2]
    report.save(tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["passed"] is True
    assert saved["images"] == 24
    assert saved["models"][0]["backend"] == "onnxruntime"
    assert [row[0] for row in parity_rows(report)] == ["best.pt", "model.onnx"]
    assert [row[3] for row in latency_rows(report)] == ["1", "1", "2", "2"]
    assert latency_rows(report)[0][-1] == "1.00"


@pytest.mark.parametrize("alter", [shift_mean, swap_to_bgr])
def test_wrong_preprocessing_fails(
    alter: Callable[[Constants, onnx.GraphProto], None],
    tiny_onnx: Path,
    tiny_checkpoint: Path,
    tiny_dataset: Path,
    tmp_path: Path,
) -> None:
    broken = altered(tiny_onnx, tmp_path / "broken.onnx", alter)
    report = run([tiny_onnx, broken], tiny_checkpoint, tiny_dataset)
    assert not report.models[0].failures
    parity = report.models[1].parity
    assert parity is not None
    (failure, *_) = report.failures
    assert str(broken) in failure
    assert f"cosine {parity.cosine_min:.6f} is" in failure
    assert parity.worst_image in failure
    assert Path(parity.worst_image).is_file()


def test_nan_fails_and_is_told(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    broken = altered(tiny_onnx, tmp_path / "nan.onnx", give_nan)
    report = run([broken], tiny_checkpoint, tiny_dataset)
    assert "gives NaN or infinity for 24 of 24 images" in report.failures[0]
    assert report.models[0].retrieval is None
    assert report.to_json()["models"][0]["parity"]["largest_difference"] is None
    assert json.dumps(report.to_json(), allow_nan=False)


def test_a_broken_reference_is_what_fails(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = altered(tiny_onnx, tmp_path / "nan.onnx", give_nan)
    report = run([tiny_checkpoint], broken, tiny_dataset)
    (failure,) = report.failures
    assert failure.startswith(f"{broken} gives NaN")
    assert report.models[0].parity is None


def test_an_export_of_another_checkpoint_is_recognised(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    broken = altered(tiny_onnx, tmp_path / "broken.onnx", shift_mean)
    other = tmp_path / "other.pt"
    other.write_bytes(tiny_checkpoint.read_bytes() + b" ")
    report = run([broken], other, tiny_dataset, limit=4)
    assert report.failures[-1].endswith("was exported from another checkpoint than the reference")


def test_fewer_images_judge_no_retrieval(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    report = run([tiny_onnx], tiny_checkpoint, tiny_dataset, limit=6)
    assert report.images == 6
    assert report.reference.retrieval is None
    assert not report.failures
    assert parity_rows(report)[1][-2:] == ("–", "–")


def test_gates_are_the_users(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    report = bench([tiny_onnx], tiny_checkpoint, tiny_dataset, (1,), Gates(min_cosine=1.1), limit=2, device="cpu")
    assert len(report.failures) == 1


@pytest.mark.parametrize(("batches", "limit"), [((0,), None), ((), None), ((1,), 0)])
def test_no_images_cannot_be_compared(
    batches: tuple[int, ...], limit: int | None, tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path
) -> None:
    with pytest.raises(PmmError, match="must be 1 or more"):
        bench([tiny_onnx], tiny_checkpoint, tiny_dataset, batches, limit=limit)
