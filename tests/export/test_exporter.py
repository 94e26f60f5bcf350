"""What is exported computes the same, is a clean graph, carries its spec, and is never written wrong."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import pmm_edge
from pmm_edge.errors import CheckFailedError, OutputError, PmmError
from pmm_edge.export import Exported, export_onnx, export_safetensors, exporter, inference_network
from pmm_edge.files import sha256
from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
from pmm_edge.spec import IMAGENET_MEAN, IMAGENET_STD, METADATA_KEY, InputSpec, ModelSpec

FORMS = ("uint8", "raw", "normalized")


@pytest.fixture(scope="module")
def exports(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    others = {form: export_onnx(tiny_checkpoint, folder / f"{form}.onnx", form).path for form in FORMS[1:]}
    return {"uint8": tiny_onnx, **others}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_batch_size_gives_the_checkpoints_embeddings(
    form: str, exports: dict[str, Path], tiny_checkpoint: Path
) -> None:
    crops = np.random.default_rng(1).integers(0, 256, (5, 96, 64, 3), dtype=np.uint8)
    normalized = ((crops / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(0, 3, 1, 2).astype(np.float32)
    fed = {"uint8": crops, "raw": crops.transpose(0, 3, 1, 2).astype(np.float32), "normalized": normalized}[form]
    with torch.inference_mode():
        expected = load_checkpoint(tiny_checkpoint).network()(torch.from_numpy(normalized)).numpy()
    session = onnxruntime.InferenceSession(exports[form], providers=["CPUExecutionProvider"])
    for batch in range(1, 6):
        (actual,) = session.run(["embeddings"], {"images": fed[:batch]})
        np.testing.assert_allclose(actual, expected[:batch], rtol=0, atol=1e-5 * expected.max())


def test_graphs_hold_the_network_and_its_preprocessing_alone(exports: dict[str, Path]) -> None:
    network = {"Conv": 23, "Relu": 21, "Add": 9, "MaxPool": 1, "ReduceMean": 1, "ReduceMax": 1, "Gemm": 2, "Concat": 1}
    before = {
        "uint8": {"Cast": 1, "Transpose": 1, "Mul": 1, "Add": 10},
        "raw": {"Mul": 1, "Add": 10},
        "normalized": {},
    }
    for form, path in exports.items():
        nodes = onnx.load(path).graph.node
        assert Counter(node.op_type for node in nodes) == network | before[form], form
    assert onnx.load(exports["uint8"]).graph.node[0].op_type == "Cast"


def test_metadata_says_what_the_file_is(exports: dict[str, Path], tiny_checkpoint: Path) -> None:
    trained = load_checkpoint(tiny_checkpoint).spec
    for form, path in exports.items():
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        spec = ModelSpec.from_json(metadata[METADATA_KEY])
        assert spec.checkpoint_sha256 == sha256(tiny_checkpoint)
        assert spec.tools["torch"] == torch.__version__.partition("+")[0]
        assert spec == replace(
            trained,
            input=InputSpec(96, 64, form=form),
            checkpoint_sha256=spec.checkpoint_sha256,
            tools=spec.tools,
        )


def test_files_hold_no_paths_of_the_machine_that_made_them(tiny_onnx: Path) -> None:
    content = tiny_onnx.read_bytes()
    for folder in (Path(pmm_edge.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert str(folder).encode() + b"/" not in content


def test_an_export_that_departs_is_not_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: torch.nn.Module, spec: InputSpec, normalize_output: bool) -> torch.nn.Module:
        return inference_network(network, replace(spec, std=(0.25, 0.25, 0.25)))

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        heard.append(f"{done}/{total}")

    heard: list[str] = []
    monkeypatch.setattr(exporter, "inference_network", wrong)
    with pytest.raises(CheckFailedError, match=r"model\.onnx was not written: at batch 1 .* depart"):
        export_onnx(tiny_checkpoint, tmp_path / "model.onnx", report=report)
    assert not list(tmp_path.iterdir())
    assert heard == ["0/3", "1/3", "2/3"]


def test_a_checkpoint_of_nan_is_not_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    weights = {**checkpoint.weights, "stage1.linear.bias": torch.full((512,), torch.nan)}
    save_checkpoint(tmp_path / "nan.pt", Checkpoint(checkpoint.spec, weights))
    with pytest.raises(CheckFailedError, match=r"nan\.pt gives NaN"):
        export_onnx(tmp_path / "nan.pt", tmp_path / "out" / "model.onnx")
    assert not list((tmp_path / "out").iterdir())


def test_safetensors_are_the_evaluation_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exported = export_safetensors(tiny_checkpoint, tmp_path / "model.safetensors")
    trained = load_checkpoint(tiny_checkpoint).weights
    with safe_open(exported.path, framework="pt") as file:
        assert ModelSpec.from_json(file.metadata()[METADATA_KEY]) == exported.spec
        assert set(file.keys()) == {name for name in trained if "classifier" not in name}
        assert all(torch.equal(file.get_tensor(name), trained[name]) for name in file.keys())  # noqa: SIM118
    crops = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), dtype=np.uint8)
    actual, expected = (pmm_edge.load(path, "cpu").embed(crops) for path in (exported.path, tiny_checkpoint))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(("export", "suffix"), [(export_onnx, ".onnx"), (export_safetensors, ".safetensors")])
def test_places_that_cannot_be_written(
    export: Callable[[Path, Path], Exported], suffix: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(PmmError, match=f"does not end in \\{suffix}. Name it"):
        export(tiny_checkpoint, tmp_path / "model.bin")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*Choose (a folder|another name)"):
        export(tiny_checkpoint, tmp_path / "file" / f"model{suffix}")


def test_what_is_returned_describes_the_file(tiny_export: Exported) -> None:
    assert tiny_export.size == tiny_export.path.stat().st_size
    assert 0 <= tiny_export.departure < 1e-5
