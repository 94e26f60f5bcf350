"""`export` checks its arguments first, writes verified files, and leaves no files if it fails."""

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
from pmm_edge.export import ExportedFile, export, graph
from pmm_edge.files import sha256
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD, METADATA_KEY, InputForm, InputSpec, ModelSpec


@pytest.mark.parametrize("form", ["uint8", "raw", "normalized"])
def test_file_gives_the_embeddings_of_the_checkpoint_and_describes_itself(
    form: InputForm, fp32: dict[str, ExportedFile], tiny_checkpoint: Path, crops: np.ndarray
) -> None:
    exported, checkpoint = fp32[form], load_checkpoint(tiny_checkpoint)
    normalized = ((crops / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32)
    fed = {"uint8": crops, "raw": crops.transpose(0, 3, 1, 2).astype(np.float32), "normalized": normalized}[form]
    with torch.inference_mode():
        expected = checkpoint.network()(torch.from_numpy(normalized)).numpy()
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    for batch in range(1, 6):
        (actual,) = session.run(["embeddings"], {"images": fed[:batch]})
        np.testing.assert_allclose(actual, expected[:batch], rtol=0, atol=1e-5 * expected.max())

    spec = ModelSpec.from_json(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert spec == exported.spec
    assert (spec.input, spec.checkpoint_sha256) == (InputSpec(96, 64, form=form), sha256(tiny_checkpoint))
    assert (spec.tools["torch"], spec.tools["opset"]) == (torch.__version__.partition("+")[0], "18")
    assert (spec.stages, spec.embedding_size, spec.precision) == (checkpoint.spec.stages, 1536, "fp32")
    assert exported.size == exported.path.stat().st_size
    assert 0 <= exported.departure < 1e-5
    assert exported.cosine_min == pytest.approx(1, abs=1e-6)


def test_files_contain_no_local_paths_and_are_reproducible(fp32: dict[str, ExportedFile], tiny_onnx: Path) -> None:
    content = tiny_onnx.read_bytes()
    assert fp32["uint8"].path.read_bytes() == content
    for folder in (Path(pmm_edge.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() + b"/" not in content


def test_safetensors_hold_the_weights_without_classifiers(
    tiny_checkpoint: Path, raw_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "onnx_graph", lambda *_: onnx.load(raw_onnx))
    _, weights = export(tiny_checkpoint, out=tmp_path / "model.onnx", input_form="raw", safetensors=True).files
    assert weights.path == tmp_path / "model.safetensors"
    trained = load_checkpoint(tiny_checkpoint).weights
    with safe_open(weights.path, framework="pt") as file:
        assert ModelSpec.from_json(file.metadata()[METADATA_KEY]) == weights.spec
        assert set(file.keys()) == {name for name in trained if "classifier" not in name}
        assert all(torch.equal(file.get_tensor(name), trained[name]) for name in file.keys())  # noqa: SIM118


def test_wrong_export_is_not_written(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(tiny_onnx)
    (scale,) = (tensor for tensor in model.graph.initializer if tensor.name == "0.scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(1.1 * onnx.numpy_helper.to_array(scale), scale.name))
    monkeypatch.setattr(graph, "onnx_graph", lambda *_: model)
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = {**checkpoint.weights, "stage1.linear.bias": torch.full((512,), torch.nan)}
    save_checkpoint(tmp_path / "nan.pt", Checkpoint(checkpoint.spec, weights))
    for source, named in ((tiny_checkpoint, r"model\.onnx"), (tmp_path / "nan.pt", r"nan\.pt")):
        with pytest.raises(CheckFailedError, match=named):
            export(source, out=tmp_path / "out" / "model.onnx")
        assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the export begins."""
    monkeypatch.setattr(graph, "onnx_graph", None)
    monkeypatch.setattr("pmm_edge.export.exporter.build_engine", None)


INVALID: list[tuple[type[PmmError], dict[str, object]]] = [
    (PmmError, {"precision": "int4"}),
    (PmmError, {"input_form": "rgb"}),
    (PmmError, {"precision": "int8", "target": "gpu"}),
    (PmmError, {"precision": "int8", "calibration_method": "max"}),
    (PmmError, {"opset": 16}),
    (PmmError, {"opset": 18, "precision": "int8"}),
    (PmmError, {"opset": 17, "precision": "int8", "target": "tensorrt"}),
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
    error: type[PmmError], options: dict, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "taken").mkdir(parents=True)
    (tmp_path / "full" / "taken" / "file").touch()
    with pytest.raises(error) as caught:
        export(tiny_checkpoint, **{"out": "model.onnx"} | options)
    assert type(caught.value) is error, "a later check has refused it"
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_exported_file_is_not_exported_again(tiny_onnx: Path, no_work: None) -> None:
    for options in (
        {},
        {"trt": True, "input_form": "raw"},
        {"trt": True, "precision": "fp16"},
        {"trt": True, "out": "other.onnx"},
        {"triton": "models", "out": "other.engine"},
    ):
        with pytest.raises(PmmError):
            export(tiny_onnx, **options)


def test_a_file_is_of_one_form_and_bundles_need_two(tiny_onnx: Path, raw_onnx: Path, tmp_path: Path) -> None:
    for model, refused, form in ((tiny_onnx, "--deepstream", "raw"), (raw_onnx, "--triton", "uint8")):
        with pytest.raises(ModelError) as caught:
            export(model, deepstream=tmp_path / "tracker", triton=tmp_path / "models")
        assert f"{refused} needs {form}" in caught.value.problem
        assert f"--input-form {form}" in caught.value.remedy
    assert not [*tmp_path.iterdir()]


def test_exported_file_needs_no_torch(raw_onnx: Path, tmp_path: Path) -> None:
    script = """
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
import pmm_edge.export
result = pmm_edge.export(sys.argv[1], deepstream=sys.argv[2])
assert not result.failures, result.failures
for use in (pmm_edge.export, pmm_edge.load):
    try:
        use(sys.argv[3])
    except pmm_edge.PmmError as error:
        print(error)
"""
    checkpoint = tmp_path / "best.pt"
    checkpoint.touch()
    command = [sys.executable, "-c", script, raw_onnx, tmp_path / "tracker", checkpoint]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("torch, torchvision, safetensors") == ended.stdout.count(".[train]") == 2
    assert (tmp_path / "tracker" / "reid.onnx").read_bytes() == raw_onnx.read_bytes()
