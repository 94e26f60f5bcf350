"""`export` checks its arguments first, writes verified files, and leaves no files if it fails."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import pmm_edge
from pmm_edge.errors import CheckFailedError, DataError, ModelError, OutputError, PmmError
from pmm_edge.export import ExportedFile, export, exporter, graph
from pmm_edge.files import sha256
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD, METADATA_KEY, InputSpec, ModelSpec

FORMS = ("uint8", "raw", "normalized")


@pytest.mark.parametrize("form", FORMS)
def test_embeddings_are_those_of_the_checkpoint(
    form: str, fp32: dict[str, ExportedFile], tiny_checkpoint: Path
) -> None:
    crops = np.random.default_rng(1).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)
    normalized = ((crops / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32)
    fed = {"uint8": crops, "raw": crops.transpose(0, 3, 1, 2).astype(np.float32), "normalized": normalized}[form]
    with torch.inference_mode():
        expected = load_checkpoint(tiny_checkpoint).network()(torch.from_numpy(normalized)).numpy()
    session = onnxruntime.InferenceSession(fp32[form].path, providers=["CPUExecutionProvider"])
    for batch in range(1, 6):
        (actual,) = session.run(["embeddings"], {"images": fed[:batch]})
        np.testing.assert_allclose(actual, expected[:batch], rtol=0, atol=1e-5 * expected.max())


@pytest.mark.parametrize("form", FORMS)
def test_spec_describes_the_file(form: str, fp32: dict[str, ExportedFile], tiny_checkpoint: Path) -> None:
    exported, trained = fp32[form], load_checkpoint(tiny_checkpoint).spec
    metadata = {entry.key: entry.value for entry in onnx.load(exported.path).metadata_props}
    spec = ModelSpec.from_json(metadata[METADATA_KEY])
    assert spec == exported.spec
    assert spec.input == InputSpec(96, 64, form=form)
    assert spec.checkpoint_sha256 == sha256(tiny_checkpoint)
    assert spec.tools["torch"] == torch.__version__.partition("+")[0]
    assert spec.tools["opset"] == "18"
    assert (spec.stages, spec.embedding_size, spec.precision) == (trained.stages, 1536, "fp32")
    assert exported.size == exported.path.stat().st_size
    assert 0 <= exported.departure < 1e-5
    assert exported.cosine_min == pytest.approx(1, abs=1e-6)


def test_files_contain_no_local_paths_and_are_reproducible(fp32: dict[str, ExportedFile], tiny_onnx: Path) -> None:
    content = tiny_onnx.read_bytes()
    assert fp32["uint8"].path.read_bytes() == content
    for folder in (Path(pmm_edge.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() + b"/" not in content


def test_newest_run_is_exported_by_default(
    tiny_checkpoint: Path, raw_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        export()
    monkeypatch.setattr(graph, "onnx_graph", lambda *_: onnx.load(raw_onnx))
    run = new_run_folder(AboutRun("new", "data", "0"), Path("runs") / "new")
    shutil.copy(tiny_checkpoint, run / "best.pt")
    result = pmm_edge.export.export(input_form="raw", safetensors=True)
    assert result.checkpoint == Path("runs/new/best.pt")
    paths = [item.path for item in result.files]
    assert paths == [run / "export/model-raw.onnx", run / "export/model-raw.safetensors"]

    trained = load_checkpoint(tiny_checkpoint).weights
    with safe_open(paths[1], framework="pt") as file:
        assert ModelSpec.from_json(file.metadata()[METADATA_KEY]) == result.files[1].spec
        assert set(file.keys()) == {name for name in trained if "classifier" not in name}
        assert all(torch.equal(file.get_tensor(name), trained[name]) for name in file.keys())  # noqa: SIM118


def test_wrong_export_is_not_written(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: object) -> onnx.ModelProto:
        model = onnx.load(tiny_onnx)
        (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "0.scale")
        scale.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(scale), scale.name))
        return model

    monkeypatch.setattr(graph, "onnx_graph", wrong)
    with pytest.raises(CheckFailedError, match=r"model\.onnx"):
        export(tiny_checkpoint, out=tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_checkpoint_with_nan_is_not_exported(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = {**checkpoint.weights, "stage1.linear.bias": torch.full((512,), torch.nan)}
    save_checkpoint(tmp_path / "nan.pt", Checkpoint(checkpoint.spec, weights))
    monkeypatch.setattr(graph, "onnx_graph", lambda *_: onnx.load(tiny_onnx))
    with pytest.raises(CheckFailedError, match=r"nan\.pt"):
        export(tmp_path / "nan.pt", out=tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the export begins."""

    def begun(*_: object) -> None:
        raise AssertionError("the export began")

    monkeypatch.setattr(exporter, "_write_onnx", begun)
    monkeypatch.setattr(exporter, "build_engine", begun)


INVALID: list[tuple[type[PmmError], dict[str, object]]] = [
    (PmmError, {"opset": 16}),
    (PmmError, {"opset": 21}),
    (PmmError, {"static_batch": 0}),
    (PmmError, {"target": "cpu"}),
    (PmmError, {"layout": "msmt17"}),
    (PmmError, {"precision": "fp16", "max_map_drop": 1}),
    (PmmError, {"precision": "int8", "max_map_drop": -1}),
    (DataError, {"precision": "int8"}),
    (PmmError, {"triton_name": "people"}),
    (PmmError, {"triton": "models", "triton_name": "a/b"}),
    (PmmError, {"optimization_level": 0}),
    (PmmError, {"timing_cache": False}),
    (PmmError, {"trt": True, "optimization_level": 9}),
    (PmmError, {"trt": True, "static_batch": 4, "batch_profile": "1,4,8"}),
    (PmmError, {"trt": True, "batch_profile": "4,8,16", "triton": "models"}),
    (ModelError, {"static_batch": 4, "triton": "models"}),
    (ModelError, {"static_batch": 4, "deepstream": "tracker"}),
    (ModelError, {"precision": "int8", "target": "cpu", "trt": True}),
    (ModelError, {"precision": "int8", "target": "cpu", "deepstream": "tracker"}),
    (PmmError, {"out": "model.bin"}),
    (OutputError, {"out": "/proc/model.onnx"}),
    (OutputError, {"deepstream": "full"}),
    (OutputError, {"triton": "full", "triton_name": "taken"}),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("error", "options"), INVALID)
def test_invalid_options_are_rejected_before_any_work(
    error: type[PmmError],
    options: dict[str, object],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "taken").mkdir(parents=True)
    (tmp_path / "full" / "taken" / "file").touch()
    with pytest.raises(error) as caught:
        export(tiny_checkpoint, **{"out": "model.onnx"} | options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".engine"])
def test_places_are_checked_before_any_work(suffix: str, tiny_checkpoint: Path, tmp_path: Path, no_work: None) -> None:
    (tmp_path / f"model{suffix}").mkdir()
    with pytest.raises(OutputError, match=f"model{suffix}"):
        export(tiny_checkpoint, out=tmp_path / "model.onnx", safetensors=True, trt=True)
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]


def test_exported_file_is_not_exported_again(tiny_onnx: Path, no_work: None) -> None:
    options: list[dict[str, object]] = [
        {},
        {"trt": True, "input_form": "raw"},
        {"trt": True, "precision": "fp16"},
        {"trt": True, "out": "other.onnx"},
        {"triton": "models", "out": "other.engine"},
        {"deepstream": "tracker"},
    ]
    for chosen in options:
        with pytest.raises(PmmError):
            export(tiny_onnx, **chosen)


def test_failed_bundle_does_not_prevent_others(
    tiny_checkpoint: Path, fp32: dict[str, ExportedFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise failure

    def copied(checkpoint: Checkpoint, source: Path, files: dict[str, Path], *_: object) -> list[ExportedFile]:
        for form, out in files.items():
            shutil.copy(fp32[form].path, out)
        return list(fp32.values())

    failure = OutputError("no space left")
    monkeypatch.setattr("pmm_edge.export.bundles.deepstream_bundle", full)
    monkeypatch.setattr(exporter, "_write_onnx", copied)
    folder = tmp_path / "models"
    result = export(tiny_checkpoint, out=tmp_path / "model.onnx", deepstream=tmp_path / "tracker", triton=folder)
    assert [bundle.folder for bundle in result.bundles] == [folder / "pmm_resnet18"]
    assert result.failures == [failure]


def test_exported_file_needs_no_torch(raw_onnx: Path, tmp_path: Path) -> None:
    script = """
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
import pmm_edge.export
result = pmm_edge.export(sys.argv[1], deepstream=sys.argv[2])
assert not result.failures, result.failures
try:
    pmm_edge.export(sys.argv[3])
except pmm_edge.PmmError as error:
    print(error)
"""
    checkpoint = tmp_path / "best.pt"
    checkpoint.touch()
    command = [sys.executable, "-c", script, raw_onnx, tmp_path / "tracker", checkpoint]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ".[train]" in ended.stdout
    assert (tmp_path / "tracker" / "reid.onnx").read_bytes() == raw_onnx.read_bytes()
