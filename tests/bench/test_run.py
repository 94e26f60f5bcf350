"""A bench measures all it can, says what it cannot, and keeps what it has when it is interrupted."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import broken
import pytest

from pmm_edge.bench import AskedGates, BenchReport, Options, bench
from pmm_edge.bench.certification import write_certificates
from pmm_edge.errors import ModelError, PmmError
from pmm_edge.export import Graph, export_onnx
from pmm_edge.runtime import Embedder, load


def run(models: list[Path], reference: Path, data: Path, **options: object) -> BenchReport:
    return bench(models, reference, data, Options(**{"batches": (1, 2), "device": "cpu", "speed": False, **options}))


def test_all_that_is_known_is_in_the_report(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    report = run([tiny_onnx], tiny_checkpoint, tiny_dataset)
    assert report.passed, report.failures
    model, base = report.models[0], report.reference
    assert model.parity is not None
    assert model.parity.whole.cosine_min > 0.999999
    assert set(model.parity.stages) == {"I", "II", "III"}
    assert base.parity is None
    assert base.retrieval is not None
    assert (model.backend, model.device, model.embedding_size) == ("onnxruntime", "cpu", 1536)
    assert model.file_bytes == tiny_onnx.stat().st_size
    assert len(model.cmc) == 50
    assert model.cmc[0] == model.retrieval.rank1
    assert model.retrieval_change is not None
    assert model.retrieval_change.queries == 12
    assert all(one.held for one in (*model.invariants, *base.invariants))
    assert (report.images, report.complete) == (24, True)
    report.save(tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["passed"] is True
    assert saved["data_sha256"] == report.data_sha256


def test_the_gpu_of_any_model_is_told_though_the_reference_runs_on_the_cpu(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu:
        name, driver, most_mhz = "NVIDIA H100", "580.65.06", 1980

    def loaded(path: Path, device: str | None) -> Embedder:
        embedder = load(path, "cpu")
        embedder.device = "cuda:1" if path.name == "engine.onnx" else "cpu"
        return embedder

    engine = Path(shutil.copy(tiny_onnx, tmp_path / "engine.onnx"))
    monkeypatch.setattr("pmm_edge.bench.pipeline.load", loaded)
    monkeypatch.setattr("pmm_edge.bench.environment.open_gpu", lambda device: Gpu() if device == "cuda:1" else None)
    report = run([tiny_onnx, engine], tiny_onnx, tiny_dataset, limit=2)
    assert report.environment["gpu"] == "NVIDIA H100, driver 580.65.06"


def test_the_start_that_is_measured_is_that_of_the_same_engine(
    tiny_onnx: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's provider of ONNX Runtime is on the same GPU as TensorRT's, and starts in another time and memory."""
    started: list[object] = []

    def on_tensorrt(path: Path, device: str | None) -> Embedder:
        embedder = load(path, "cpu")
        embedder.backend, embedder.device = "onnxruntime-tensorrt", "cuda:0"
        return embedder

    monkeypatch.setattr("pmm_edge.bench.pipeline.load", on_tensorrt)
    monkeypatch.setattr("pmm_edge.bench.pipeline._latencies", lambda run, report: None)
    monkeypatch.setattr(
        "pmm_edge.bench.pipeline.measure_cold_start", lambda path, device, batch: started.append(device)
    )
    run([], tiny_onnx, tiny_dataset, limit=2, speed=True)
    assert started == ["tensorrt:0"]


def test_the_datas_hash_is_that_of_names_and_contents(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    def of(data: Path) -> str:
        return run([], tiny_onnx, data, limit=None).data_sha256

    same = Path(shutil.copytree(tiny_dataset, tmp_path / "same"))
    assert of(same) == of(tiny_dataset)
    image = sorted((same / "query").iterdir())[0]
    image.write_bytes(image.read_bytes() + b" ")
    assert of(same) != of(tiny_dataset)


def test_a_folder_without_identities_shows_parity_alone(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path
) -> None:
    report = run([tiny_onnx], tiny_checkpoint, tiny_dataset / "query")
    assert report.passed
    assert report.models[0].parity is not None
    assert (report.models[0].retrieval, report.models[0].retrieval_change, report.models[0].cmc) == (None, None, [])
    assert any("parity without retrieval" in warning for warning in report.warnings)


def test_a_broken_reference_is_what_fails(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    nan = broken.altered(tiny_onnx, tmp_path / "nan.onnx", broken.gives_nan_for(1000))
    report = run([tiny_onnx], nan, tiny_dataset, limit=4)
    (failure,) = report.failures
    assert failure.startswith(f"{nan} breaks the invariant 'finite': NaN or infinity for 4 of 4 images")
    assert report.models[0].parity is None
    assert report.models[0].failures == []
    assert any("is broken itself: no model was judged against it" in warning for warning in report.warnings)
    assert json.dumps(report.to_json(), allow_nan=False)


def test_embeddings_of_another_size_cannot_be_compared(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    half = broken.cut_in_half(tiny_onnx, tmp_path / "half.onnx")
    report = run([half, tiny_onnx], tiny_onnx, tiny_dataset, limit=4)
    assert report.failures == [f"{half} gives embeddings of 768 numbers, the reference of 1536"]
    assert report.models[0].parity is None
    assert report.models[1].parity is not None


def test_an_export_of_another_checkpoint_is_recognised(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    wrong = broken.altered(tiny_onnx, tmp_path / "wrong.onnx", broken.changes_a_layer)
    other = tmp_path / "other.pt"
    other.write_bytes(tiny_checkpoint.read_bytes() + b" ")
    (model,) = run([wrong], other, tiny_dataset, limit=4).models
    assert model.failures[0].startswith("cosine ")
    assert model.likely_cause == "it was exported from another checkpoint than the reference"
    assert run([wrong], tiny_checkpoint, tiny_dataset, limit=4).models[0].likely_cause is None


def test_embeddings_of_length_one_are_judged_by_direction(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    unit = export_onnx(tiny_checkpoint, tmp_path / "unit.onnx", graph=Graph(normalize_output=True)).path
    report = run([unit], tiny_onnx, tiny_dataset)
    assert report.failures == []
    (model,) = report.models
    assert model.retrieval_change is not None
    assert report.reference.retrieval != model.retrieval_change.reference == model.retrieval  # by cosine, not distance
    assert "unit.onnx gives embeddings of length 1 and model.onnx does not" in report.warnings[0]
    assert run([tiny_onnx], unit, tiny_dataset).failures == []


def test_a_model_that_is_its_own_reference_is_told_and_not_certified(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(tiny_onnx, tmp_path / "copy.onnx"))
    report = run([copy], tiny_onnx, tiny_dataset)
    assert report.passed
    assert "copy.onnx is the reference itself: that they agree proves nothing" in report.warnings
    assert "it is the reference itself" in write_certificates(report).none[str(copy)]


def test_a_precision_that_is_only_claimed_fails(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    labelled = broken.labelled(tiny_onnx, tmp_path / "int8.onnx", "int8")
    (model,) = run([labelled], tiny_onnx, tiny_dataset).models
    assert model.failures == ["says that it is int8, and its weights are 100 % fp32"]


def test_a_model_that_does_not_load_ends_it_before_anything_is_measured(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(tiny_onnx.read_bytes()[:1000])
    monkeypatch.setattr("pmm_edge.bench.pipeline.embed_files", None)
    with pytest.raises(ModelError, match=r"truncated\.onnx"):
        run([tiny_onnx, truncated], tiny_onnx, tiny_dataset)


def test_a_model_that_loads_and_does_not_run_fails_and_the_others_are_measured(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    baked = broken.altered(tiny_onnx, tmp_path / "baked.onnx", broken.bakes_its_batch)
    report = run([baked, tiny_onnx], tiny_onnx, tiny_dataset)
    failed, good = report.models
    assert "cannot be run: onnxruntime cannot run" in failed.failures[0]
    assert "at batch" in failed.failures[0]
    assert failed.parity is None
    assert (good.failures, good.parity is None) == ([], False)
    assert report.complete
    assert not report.passed


def test_a_reference_that_does_not_run_judges_nobody(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    baked = broken.altered(tiny_onnx, tmp_path / "baked.onnx", broken.bakes_its_batch)
    report = run([tiny_onnx], baked, tiny_dataset, speed=True)
    assert "cannot be run" in report.reference.failures[0]
    assert (report.models[0].parity, report.models[0].latency) == (None, [])
    assert "broken itself" in report.warnings[0]


@pytest.mark.parametrize("step", ["embed_files", "held_in_batches", "retrieval_change", "measure_latency"])
def test_interrupted_it_keeps_what_it_has(
    step: str, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = import_module("pmm_edge.bench." + ("speed" if step == "measure_latency" else "run"))
    real, calls = getattr(home, step), []

    def once_then_interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **({**kwargs, "min_runs": 2, "min_seconds": 0} if step == "measure_latency" else kwargs))

    monkeypatch.setattr(home, step, once_then_interrupted)
    report = run([tiny_onnx, tiny_onnx], tiny_onnx, tiny_dataset, speed=step == "measure_latency")
    assert (report.complete, report.passed) == (False, False)
    assert report.reference.retrieval is not None
    assert (report.models[0].retrieval is None) == (step == "embed_files")
    assert bool(report.reference.invariants) == (step != "embed_files")
    assert (report.models[0].retrieval_change is None) == (step in ("embed_files", "held_in_batches"))
    assert [one.batch for one in report.reference.latency if one.scope == "model"] == (
        [1] if step == "measure_latency" else []
    )
    report.save(tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["complete"] is False


def test_gates_are_the_users(tiny_onnx: Path, tiny_dataset: Path) -> None:
    asked = AskedGates(min_mean_cosine=1.0, min_cosine=-1)
    report = run([tiny_onnx], tiny_onnx, tiny_dataset, limit=2, gates=asked)
    assert report.models[0].gates.min_cosine == -1
    assert report.models[0].gates.max_map_drop == 0.1


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}])
def test_options_that_cannot_be_measured(wrong: dict[str, object]) -> None:
    with pytest.raises(PmmError, match="1 or more"):
        Options(**wrong)
