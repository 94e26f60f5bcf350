"""A bench measures what it can, reports what it cannot, and keeps what it has when it is interrupted."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import broken
import pytest

from pmm_edge.bench import BenchReport, GateOverrides, bench, pipeline
from pmm_edge.bench.pipeline import bench_images
from pmm_edge.bench.report import Cause, ColdStart, FailureKind, InvariantName, ModelReport, WarningKind
from pmm_edge.data.dataset import data_sha256
from pmm_edge.errors import DataError, ModelError, PmmError
from pmm_edge.export import export
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.runtime import Embedder, load


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files go to a temporary folder, timings are short, no process is started and no page is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "PROBES", 2)
    monkeypatch.setattr("pmm_edge.bench.timing.MAX_WARM_UP_SECONDS", 0.1)
    monkeypatch.setattr(pipeline, "network_pictures", lambda *args, **kwargs: [])
    monkeypatch.setattr(pipeline, "write_html", lambda *args: None)
    monkeypatch.setattr(pipeline, "measure_cold_start", lambda path, device, batch: ColdStart(1.0, 1.0, batch))
    for name in ("measure_latency", "measure_end_to_end"):
        monkeypatch.setattr(pipeline, name, partial(getattr(pipeline, name), min_runs=2, min_seconds=0))


def run(models: list[Path], reference: Path, data: Path, **options: object) -> BenchReport:
    defaults = {"batch_sizes": (1, 2), "device": "cpu", "parity_only": True}
    return bench(models, reference=reference, data=data, **{**defaults, **options}).report


def kinds(model: ModelReport) -> list[FailureKind]:
    return [failure.kind for failure in model.failures]


def warned(report: BenchReport) -> list[WarningKind]:
    return [warning.kind for warning in report.warnings]


# The report


def test_everything_is_in_the_report(tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    result = bench(tiny_onnx, reference=tiny_checkpoint, data=tiny_dataset, batch_sizes=(2, 1, 2), device="cpu")
    report = result.report
    assert report.passed
    assert [path.name for path in result.files] == ["bench.json", "bench.md", "report.html"]
    assert all(path.is_file() for path in result.files[:2])
    model, base = report.models[0], report.reference
    assert model.parity is not None
    assert model.parity.whole.cosine_min > 0.999999
    assert set(model.parity.stages) == {"I", "II", "III"}
    assert (model.backend, model.device, model.embedding_size) == ("onnxruntime", "cpu", 1536)
    assert model.file_bytes == tiny_onnx.stat().st_size
    assert base.parity is None
    assert base.retrieval is not None
    assert model.retrieval is not None
    assert (len(model.cmc), model.cmc[0]) == (50, model.retrieval.rank1)
    assert model.retrieval_change is not None
    assert model.retrieval_change.queries == 12
    assert {one.name for one in model.invariants} == set(InvariantName) - {InvariantName.UNIT_LENGTH}
    assert all(one.held for one in (*model.invariants, *base.invariants))
    timed = [("model", 1), ("model", 2), ("end to end", 1), ("end to end", 2)]
    assert [(one.scope, one.batch) for one in model.latency] == timed
    assert model.cold_start == ColdStart(1.0, 1.0, 2)
    assert report.images == 24
    saved = json.loads(Path("bench.json").read_text())
    assert (saved["passed"], saved["data_sha256"]) == (True, report.data_sha256)
    assert result.certificates.refused == {}
    assert result.certificates.written
    result.certificates.written[0].unlink()


def test_by_default_all_exports_of_the_newest_run_are_compared(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run_folder(AboutRun("one", str(tiny_dataset), "0"), Path("runs/one"))
    (folder / "export").mkdir()
    shutil.copy(tiny_checkpoint, folder / "best.pt")
    with pytest.raises(ModelError, match="export"):
        bench()
    shutil.copy(tiny_onnx, folder / "export" / "model.onnx")
    monkeypatch.setattr(pipeline, "check_batches", lambda *args: [])
    for arguments in ({}, {"models": folder / "export/model.onnx"}, {"reference": folder}):
        result = bench(**arguments, limit=2, device="cpu", parity_only=True)
        assert result.report.reference.path.endswith("runs/one/best.pt")
        assert [Path(model.path).name for model in result.report.models] == ["model.onnx"]
        assert result.files[0].parent.name == "one"


def test_the_hash_of_the_data_covers_names_contents_and_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jpg", tmp_path / "b.jpg"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    hashes = {data_sha256(paths, tmp_path) for paths in ([first, second], [second, first], [first])}
    second.write_bytes(b"3")
    hashes.add(data_sha256([first, second], tmp_path))
    second.rename(tmp_path / "c.jpg")
    hashes.add(data_sha256([first, tmp_path / "c.jpg"], tmp_path))
    assert len(hashes) == 5
    with pytest.raises(DataError, match=r"b\.jpg"):
        data_sha256([second], tmp_path)


def test_cold_start_uses_the_same_engine(tiny_onnx: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's CUDA provider runs on the same GPU as TensorRT, with another start-up time and memory."""
    started: list[object] = []

    def on_tensorrt(path: Path, device: str | None) -> Embedder:
        embedder = load(path, "cpu")
        embedder.backend, embedder.device = "onnxruntime-tensorrt", "cuda:0"
        return embedder

    monkeypatch.setattr(pipeline, "load", on_tensorrt)
    monkeypatch.setattr(pipeline, "_measure_latencies", lambda *args: None)
    monkeypatch.setattr(pipeline, "measure_cold_start", lambda path, device, batch: started.append(device))
    run([tiny_onnx], tiny_onnx, tiny_dataset, limit=2, parity_only=False)
    assert started == ["tensorrt:0", "tensorrt:0"]


def test_gates_can_be_overridden(tiny_onnx: Path, tiny_dataset: Path) -> None:
    report = run([tiny_onnx], tiny_onnx, tiny_dataset, limit=2, gates=GateOverrides(min_cosine=-1))
    assert (report.models[0].gates.min_cosine, report.models[0].gates.max_map_drop) == (-1, 0.1)


@pytest.mark.parametrize("sizes", [(), (0,), (1, -1)])
def test_batch_sizes_below_1_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(PmmError):
        bench(batch_sizes=sizes)


# Models that fail, and comparisons that show less


def test_a_broken_reference_fails_and_nothing_is_compared_with_it(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    nan = broken.altered(tiny_onnx, tmp_path / "nan.onnx", broken.gives_nan_for(1000))
    report = run([tiny_onnx], nan, tiny_dataset, limit=4)
    ((model, failure),) = report.failures
    assert (model.path, failure.kind, failure.invariant.images) == (str(nan), FailureKind.INVARIANT, 4)
    assert (report.models[0].parity, report.models[0].failures) == (None, [])
    assert WarningKind.REFERENCE_BROKEN in warned(report)


def test_embeddings_of_another_size_are_not_compared(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    half = broken.cut_in_half(tiny_onnx, tmp_path / "half.onnx")
    report = run([half, tiny_onnx], tiny_onnx, tiny_dataset, limit=4)
    (failure,) = report.models[0].failures
    assert (failure.kind, failure.value, failure.limit) == (FailureKind.EMBEDDING_SIZE, 768, 1536)
    assert report.models[0].parity is None
    assert report.models[1].parity is not None


def test_an_export_of_another_checkpoint(
    tiny_onnx: Path, tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    wrong = broken.altered(tiny_onnx, tmp_path / "wrong.onnx", broken.changes_a_layer)
    other = tmp_path / "other.pt"
    other.write_bytes(tiny_checkpoint.read_bytes() + b" ")
    (model,) = run([wrong], other, tiny_dataset, limit=4).models
    assert FailureKind.COSINE in kinds(model)
    assert model.likely_cause is not None
    assert model.likely_cause.cause is Cause.OTHER_CHECKPOINT
    assert run([wrong], tiny_checkpoint, tiny_dataset, limit=4).models[0].likely_cause is None


def test_unit_length_embeddings_are_compared_by_direction(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    unit = export(tiny_checkpoint, out=tmp_path / "unit.onnx", normalize_output=True).files[0].path
    report = run([unit], tiny_onnx, tiny_dataset)
    (model,) = report.models
    assert model.failures == []
    assert InvariantName.UNIT_LENGTH in {one.name for one in model.invariants}
    assert model.retrieval_change is not None
    assert report.reference.retrieval != model.retrieval_change.reference == model.retrieval  # cosine, not distance
    assert warned(report)[0] is WarningKind.UNIT_LENGTH
    assert report.reference.retrieval is not None
    assert report.warnings[0].limit == report.reference.retrieval.mAP
    assert run([tiny_onnx], unit, tiny_dataset, limit=4).models[0].failures == []


def test_a_model_that_is_its_own_reference_is_not_certified(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(tiny_onnx, tmp_path / "copy.onnx"))
    result = bench(copy, reference=tiny_onnx, data=tiny_dataset, device="cpu", parity_only=True, batch_sizes=(1,))
    assert result.report.passed
    assert WarningKind.SAME_FILE in warned(result.report)
    assert set(result.certificates.refused) == {str(copy)}


def test_a_declared_precision_that_is_wrong(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    labelled = broken.labelled(tiny_onnx, tmp_path / "int8.onnx", "int8")
    assert kinds(run([labelled], tiny_onnx, tiny_dataset, limit=4).models[0]) == [FailureKind.PRECISION]


def test_a_model_that_does_not_load_stops_the_bench(
    tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(tiny_onnx.read_bytes()[:1000])
    monkeypatch.setattr(pipeline, "embed_files", None)
    with pytest.raises(ModelError, match=r"truncated\.onnx"):
        run([tiny_onnx, truncated], tiny_onnx, tiny_dataset)
    assert not Path("bench.json").exists()


def test_a_model_that_does_not_run_fails_alone(tiny_onnx: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    baked = broken.altered(tiny_onnx, tmp_path / "baked.onnx", broken.bakes_its_batch)
    report = run([baked, tiny_onnx], tiny_onnx, tiny_dataset)
    failed, good = report.models
    assert FailureKind.CANNOT_RUN in kinds(failed)
    assert failed.parity is None
    assert good.failures == []
    assert good.parity is not None
    assert report.complete
    assert not report.passed
    report = run([tiny_onnx], baked, tiny_dataset, parity_only=False)
    assert FailureKind.CANNOT_RUN in kinds(report.reference)
    assert (report.models[0].parity, report.models[0].latency) == (None, [])


@pytest.mark.parametrize("step", ["embed_files", "check_batches", "retrieval_change", "measure_latency"])
def test_an_interrupt_keeps_what_was_measured(
    step: str, tiny_onnx: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = getattr(pipeline, step), []

    def once_then_interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, step, once_then_interrupted)
    report = run([tiny_onnx, tiny_onnx], tiny_onnx, tiny_dataset, parity_only=step != "measure_latency")
    assert (report.complete, report.passed) == (False, False)
    assert report.reference.retrieval is not None
    assert (report.models[0].retrieval is None) == (step == "embed_files")
    assert bool(report.reference.invariants) == (step != "embed_files")
    assert (report.models[0].retrieval_change is None) == (step in ("embed_files", "check_batches"))
    timed = [one.batch for one in report.reference.latency if one.scope == "model"]
    assert timed == ([1] if step == "measure_latency" else [])
    assert json.loads(Path("bench.json").read_text())["complete"] is False


def test_an_interrupt_before_the_models_are_loaded(
    tiny_onnx: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "bench_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([tiny_onnx], tiny_onnx, tiny_dataset)


# Images


def test_a_data_set_gives_queries_and_gallery(tiny_dataset: Path) -> None:
    images = bench_images(tiny_dataset)
    assert images.dataset is not None
    assert images.paths == [*images.dataset.query.paths, *images.dataset.gallery.paths]
    assert images.warning is None
    assert bench_images(tiny_dataset, limit=24).dataset is not None


def test_folders_and_lists_give_crops_without_retrieval(tiny_dataset: Path, tmp_path: Path) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text("\n".join(str(path) for path in (tiny_dataset / "query").iterdir()))
    for source in (tiny_dataset / "query", lines):
        images = bench_images(source)
        assert (len(images.paths), images.dataset) == (12, None)
        assert images.warning is not None
        assert images.warning.kind is WarningKind.NO_IDENTITIES


def test_a_limit_spreads_over_all_images(tiny_dataset: Path) -> None:
    everything, images = bench_images(tiny_dataset).paths, bench_images(tiny_dataset, limit=6)
    assert (images.paths, images.dataset) == (everything[::4], None)
    assert images.warning is not None
    assert (images.warning.kind, images.warning.count, images.warning.total) == (WarningKind.LIMITED, 6, 24)


@pytest.mark.parametrize("junk", [False, True])
def test_no_query_with_a_match_is_refused(junk: bool, tiny_dataset: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    if junk:
        for path in (root / "query").iterdir():
            path.rename(path.with_name(f"-1{path.name[4:]}"))
        shutil.copytree(root / "query", root / "bounding_box_test", dirs_exist_ok=True)
    else:
        for path in [*(root / "bounding_box_test").iterdir(), *(root / "query").iterdir()]:
            if "_c1" not in path.name:
                path.unlink()
    with pytest.raises(DataError, match="match"):
        bench_images(root)


def test_sources_without_images_are_refused(tmp_path: Path, tiny_dataset: Path) -> None:
    for source in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError):
            bench_images(source)
    with pytest.raises(PmmError):
        bench_images(tiny_dataset, limit=0)
    (tmp_path / "list.txt").write_text(str(next((tiny_dataset / "query").iterdir())))
    with pytest.raises(DataError):
        bench_images(tmp_path / "list.txt", layout="market1501")
