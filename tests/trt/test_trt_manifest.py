"""What does not fit is refused before TensorRT sees it, with the command that puts it right."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import double
import pytest

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.export.tensorrt import BuiltEngine, build_engine
from pmm_edge.runtime.manifest import BatchProfile, BuildSettings, manifest_path


def refused(engine: Path, message: str, command: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        pmm_edge.load(engine)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(command)


def rebuild(engine: Path) -> str:
    return f"Build it again: pmm export {engine.with_suffix('.onnx')} --trt --batch 2,3,4"


def test_engines_that_are_damaged_or_changed(built: BuiltEngine, onnx: Path) -> None:
    content = built.path.read_bytes()
    built.path.write_bytes(content[:-1])
    refused(built.path, rf"model\.engine has {len(content) - 1} bytes instead of {len(content)}", rebuild(built.path))
    built.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(built.path, r"is not the engine that model\.manifest\.json describes", rebuild(built.path))
    built.path.write_bytes(content)
    onnx.write_bytes(onnx.read_bytes() + b" ")
    refused(built.path, r"model\.onnx has changed since model\.engine was built", rebuild(built.path))
    onnx.unlink()
    assert pmm_edge.load(built.path).backend == "tensorrt"  # the engine needs no ONNX file beside it


def test_an_engine_elsewhere_knows_its_onnx_file(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    engine = build_engine(onnx, tmp_path / "elsewhere" / "x.engine").path
    command = f"Build it again: pmm export {onnx} --trt --batch 1,16,64 --out {engine}"
    refused_now(engine, "is not the engine that", command, engine, engine.read_bytes()[:-1] + b"?")
    assert pmm_edge.load(engine).backend == "tensorrt"
    refused_now(engine, r"export/model\.onnx has changed since x\.engine was built", command, onnx, b"another")
    moved = tmp_path / "moved"
    (tmp_path / "export").rename(moved)
    assert pmm_edge.load(engine).backend == "tensorrt"  # where it is gone, nothing is held against it


def refused_now(engine: Path, message: str, command: str, changed: Path, content: bytes) -> None:
    """Loading is refused while a file has other content."""
    before = changed.read_bytes()
    changed.write_bytes(content)
    refused(engine, message, command)
    changed.write_bytes(before)


def test_an_engine_behind_a_symbolic_link_finds_its_onnx_file(gpu: double.FakeGpu, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    engine = build_engine(onnx, tmp_path / "link" / "model.engine").path
    onnx.write_bytes(b"another")
    refused(engine, f"{onnx} has changed since", f"--batch 1,16,64 --out {engine}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/etc/passwd", "'/etc/passwd' is no relative path of a file"),
        ("", "'' is no relative path of a file"),
        (".", "'.' is no relative path of a file"),
        ("a\nb.onnx", "it holds characters that a terminal would obey"),
        ("\u001b[31m.onnx", "it holds characters that a terminal would obey"),
        (7, "onnx is not what it must be"),
        (None, "onnx is not what it must be"),
    ],
)
def test_a_manifest_names_its_onnx_file_and_nothing_else(name: object, said: str, built: BuiltEngine) -> None:
    path = manifest_path(built.path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"onnx": name}))
    refused(built.path, rf"cannot be read \(ValueError: {said}\)", "--batch 1,16,64")


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        (("machine", "tensorrt"), 10.3, "ValueError: tensorrt is not what it must be"),
        (("machine", "gpu"), None, "ValueError: gpu is not what it must be"),
        (("settings", "version_compatible"), "yes", "ValueError: version_compatible is not what it must be"),
        (("settings", "batch"), [1, 2, 3], "ValueError: batch is not what it must be"),
        (("engine_size",), "many", "ValueError: engine_size is not what it must be"),
        (("precision", "layers"), {"FP32": "all"}, "ValueError: layers.FP32 is not what it must be"),
    ],
)
def test_entries_of_another_type(entry: tuple[str, ...], value: object, said: str, built: BuiltEngine) -> None:
    path = manifest_path(built.path)
    *groups, name = entry
    content = group = json.loads(path.read_text())
    for inner in groups:
        group = group[inner]
    group[name] = value
    path.write_text(json.dumps(content))
    refused(built.path, rf"model\.manifest\.json cannot be read \({said}\)", "--batch 1,16,64")


def test_a_manifest_that_is_nested_too_deeply(built: BuiltEngine) -> None:
    path = manifest_path(built.path)
    path.write_text(path.read_text().replace('"dataset": null', f'"dataset": {"[" * 100_000}{"]" * 100_000}'))
    refused(built.path, r"cannot be read \(ValueError: it is nested too deeply\)", "--batch 1,16,64")


@pytest.mark.parametrize("version", ["", "unknown", "9" * 5000])
def test_a_version_compatible_engine_of_no_version(version: str, gpu: double.FakeGpu, onnx: Path) -> None:
    settings = BuildSettings(BatchProfile(1, 1, 2), version_compatible=True)
    engine = build_engine(onnx, onnx.with_suffix(".engine"), settings).path
    path = manifest_path(engine)
    content = json.loads(path.read_text())
    content["machine"]["tensorrt"] = version
    path.write_text(json.dumps(content))
    refused(engine, "this is TensorRT 10.3.0", "--batch 1,1,2 --version-compatible")


def test_missing_and_unreadable_manifests(built: BuiltEngine) -> None:
    path, default = manifest_path(built.path), f"pmm export {built.path.with_suffix('.onnx')} --trt --batch 1,16,64"
    written = path.read_text()
    for garbled in ("", "{}", "[]", written[:-10], written.replace('"schema": 1', '"schema": 9'), '{"schema": 1}'):
        path.write_text(garbled)
        refused(built.path, r"model\.manifest\.json cannot be read", default)
    path.unlink()
    refused(built.path, r"model\.engine has no model\.manifest\.json beside it", default)
    built.path.unlink()
    refused(built.path, r"model\.engine does not exist", default)


def test_the_command_for_a_missing_engine_names_its_folder_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "once again"
    refused(folder / "a.engine", "does not exist", f"Build it here: pmm export '{folder}/a.onnx' --trt --batch 1,16,64")


def test_other_machines(built: BuiltEngine, install: Callable[..., double.FakeGpu]) -> None:
    install(tensorrt="10.13.0.35")
    refused(built.path, r"built with TensorRT 10\.3\.0, this is TensorRT 10\.13\.0\.35", rebuild(built.path))
    install(double.FakeGpu("NVIDIA L4", (8, 9)))
    refused(built.path, r"built on Orin \(compute capability 8\.7\), this is NVIDIA L4 \(8\.9\)", rebuild(built.path))


@pytest.mark.parametrize(
    ("built_with", "here", "loads"),
    [
        ("10.3.0", "10.13.0.35", True),
        ("10.3.0", "11.4.0.106", True),
        ("10.13.0.35", "10.3.0", False),
        ("11.4.0.106", "10.13.0.35", False),
        ("10.3.0", "12.0.0", False),
    ],
)
def test_version_compatible_engines(
    built_with: str, here: str, loads: bool, install: Callable[..., double.FakeGpu], onnx: Path
) -> None:
    install(tensorrt=built_with)
    settings = BuildSettings(BatchProfile(1, 1, 2), version_compatible=True)
    built = build_engine(onnx, onnx.with_suffix(".engine"), settings)
    install(tensorrt=here)
    if loads:
        assert pmm_edge.load(built.path).device == "cuda:0"
    else:
        refused(built.path, "this is TensorRT", "--trt --batch 1,1,2 --version-compatible")


def test_hardware_compatible_engines(install: Callable[..., double.FakeGpu], onnx: Path) -> None:
    install(double.FakeGpu("NVIDIA A10", (8, 6)))
    settings = BuildSettings(BatchProfile(1, 1, 2), hardware_compatible=True)
    built = build_engine(onnx, onnx.with_suffix(".engine"), settings)
    install(double.FakeGpu("NVIDIA H100", (9, 0)))
    assert pmm_edge.load(built.path).device == "cuda:0"
    install(double.FakeGpu("NVIDIA T4", (7, 5)))
    refused(built.path, "this is NVIDIA T4", "--trt --batch 1,1,2 --hardware-compatible")


def test_the_command_repeats_every_setting() -> None:
    settings = BuildSettings(BatchProfile(1, 2, 3), 0.5, 5, True, True, False)
    assert settings.command(Path("a b.onnx")) == (
        "pmm export 'a b.onnx' --trt --batch 1,2,3 --workspace 0.5 --optimization-level 5"
        " --hardware-compatible --version-compatible --no-timing-cache"
    )


def test_a_manifest_survives_its_file(built: BuiltEngine) -> None:
    manifest = replace(built.manifest, settings=BuildSettings(BatchProfile(1, 2, 3), 0.5, 5, True, True, False))
    assert type(manifest).from_json(manifest.to_json()) == manifest
    assert json.loads(manifest.to_json())["machine"]["gpu"] == "Orin"
