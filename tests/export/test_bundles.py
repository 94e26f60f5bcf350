"""What DeepStream and Triton are given follows from the spec, and their own formats say that it is well-formed."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx as onnx_package
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

import pmm_edge
from pmm_edge.errors import ModelError, OutputError, PmmError
from pmm_edge.export import Graph, export_onnx
from pmm_edge.export.bundles import deepstream_bundle, triton_bundle
from pmm_edge.export.bundles.deepstream import reid_section
from pmm_edge.export.bundles.triton import model_config, model_name
from pmm_edge.export.exporter import Asked, Plan, carry_out
from pmm_edge.files import sha256
from pmm_edge.runtime.manifest import (
    BatchProfile,
    BuildSettings,
    EngineManifest,
    Machine,
    PrecisionCount,
    manifest_path,
    onnx_seen_from,
)
from pmm_edge.spec import METADATA_KEY, ModelSpec


@pytest.fixture(scope="module")
def raw_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(tiny_checkpoint, tmp_path_factory.mktemp("raw") / "model-raw.onnx", form="raw").path


@pytest.fixture(scope="module")
def deepstream(raw_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deepstream_bundle(raw_onnx, tmp_path_factory.mktemp("bundle") / "tracker").folder


@pytest.fixture(scope="module")
def triton(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return triton_bundle(tiny_onnx, tmp_path_factory.mktemp("repository")).folder


@pytest.fixture(scope="module")
def spec(tiny_onnx: Path) -> ModelSpec:
    return pmm_edge.load(tiny_onnx, "cpu").spec


def test_the_trackers_section_is_that_of_the_spec(deepstream: Path) -> None:
    spec = pmm_edge.load(deepstream / "reid.onnx", "cpu").spec
    reid = yaml.safe_load((deepstream / "config_tracker_NvDCF.yml").read_text())["ReID"]
    assert reid == yaml.safe_load((deepstream / "reid_section.yml").read_text())["ReID"]
    assert reid == {
        "reidType": 2,
        "batchSize": 100,
        "workspaceSize": 1000,
        "reidFeatureSize": spec.embedding_size,
        "reidHistorySize": 100,
        "inferDims": [3, spec.input.height, spec.input.width],
        "networkMode": 0,
        "inputOrder": 0,
        "colorFormat": 0,
        "offsets": [0.0, 0.0, 0.0],
        "netScaleFactor": 1.0,
        "keepAspc": 0,
        "addFeatureNormalization": 1,
        "outputReidTensor": 0,
        "onnxFile": "reid.onnx",
        "modelEngineFile": "reid.onnx_b100_gpu0_fp32.engine",
    }


def test_what_the_tracker_feeds_gives_the_networks_embeddings(deepstream: Path, tiny_onnx: Path) -> None:
    """The tracker's arithmetic, from its own configuration, on 8-bit crops of network size."""
    reid = yaml.safe_load((deepstream / "reid_section.yml").read_text())["ReID"]
    _, height, width = reid["inferDims"]
    crops = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    offsets = np.array(reid["offsets"], np.float32)[:, None, None]
    planes = np.float32(reid["netScaleFactor"]) * (crops.transpose(0, 3, 1, 2).astype(np.float32) - offsets)
    session = onnxruntime.InferenceSession(deepstream / reid["onnxFile"], providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": planes})
    expected = pmm_edge.load(tiny_onnx, "cpu").embed(crops)
    assert embeddings.shape[1] == reid["reidFeatureSize"]
    np.testing.assert_allclose(embeddings, expected, rtol=1e-4, atol=1e-4)


def test_the_trackers_configuration_is_complete(deepstream: Path) -> None:
    config = yaml.safe_load((deepstream / "config_tracker_NvDCF.yml").read_text())
    assert set(config) == {
        "BaseConfig",
        "TargetManagement",
        "TrajectoryManagement",
        "DataAssociator",
        "StateEstimator",
        "VisualTracker",
        "ReID",
    }
    assert config["TrajectoryManagement"]["enableReAssoc"] == 1
    assert all(isinstance(value, int | float) for name in set(config) - {"ReID"} for value in config[name].values())


@pytest.mark.parametrize(("precision", "mode"), [("fp32", 0), ("fp16", 1), ("int8", 2)])
def test_the_network_mode_is_that_of_the_precision(precision: str, mode: int, spec: ModelSpec) -> None:
    reid = yaml.safe_load(reid_section(replace(spec, precision=precision)))["ReID"]
    assert reid["networkMode"] == mode
    assert reid["modelEngineFile"].endswith(f"_{precision}.engine")


def test_a_precision_that_the_tracker_lacks(spec: ModelSpec) -> None:
    with pytest.raises(ModelError, match="no network mode for precision fp8"):
        reid_section(replace(spec, precision="fp8"))


def test_the_readmes_command_makes_paths_absolute(raw_onnx: Path, tmp_path: Path) -> None:
    folder = deepstream_bundle(raw_onnx, tmp_path / "tracker").folder
    readme = (folder / "README.md").read_text()
    (command,) = [line.strip() for line in readme.splitlines() if line.strip().startswith("sed ")]
    subprocess.run(["bash", "-c", command], cwd=folder, check=True)
    reid = yaml.safe_load((folder / "config_tracker_NvDCF.yml").read_text())["ReID"]
    assert Path(reid["onnxFile"]) == folder / "reid.onnx"
    assert Path(reid["modelEngineFile"]).parent == folder


def parsed(config: str) -> Any:
    return text_format.Parse(config, model_config_pb2.ModelConfig())


def test_tritons_own_schema_reads_the_configuration(triton: Path, spec: ModelSpec) -> None:
    config = parsed((triton / "config.pbtxt").read_text())
    assert config.name == triton.name == "pmm_resnet18"
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 64)
    session = onnxruntime.InferenceSession(triton / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for (tensor,), (declared,), kind in (
        (session.get_inputs(), config.input, model_config_pb2.TYPE_UINT8),
        (session.get_outputs(), config.output, model_config_pb2.TYPE_FP32),
    ):
        assert declared.name == tensor.name
        assert list(declared.dims) == tensor.shape[1:]
        assert declared.data_type == kind
    assert list(config.input[0].dims) == [spec.input.height, spec.input.width, 3]
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert ModelSpec.from_json(config.parameters[METADATA_KEY].string_value) == spec


def engine_of(onnx: Path, engine: Path, batch: BatchProfile = BatchProfile(1, 8, 32)) -> Path:
    """What a build leaves, as far as it is looked at: a file, and the manifest that describes it."""
    engine.write_bytes(b"engine")
    manifest = EngineManifest(
        spec=pmm_edge.load(onnx, "cpu").spec,
        onnx=onnx_seen_from(engine, onnx),
        onnx_sha256=sha256(onnx),
        engine_sha256=sha256(engine),
        engine_size=6,
        machine=Machine("Orin", "8.7", "10.3.0", "12.6", "12.8"),
        settings=BuildSettings(batch),
        precision=PrecisionCount({}, {}),
        build_seconds=1.0,
    )
    manifest_path(engine).write_text(manifest.to_json())
    return engine


def test_an_engine_is_served_as_a_tensorrt_plan(tiny_onnx: Path, tmp_path: Path) -> None:
    engine = engine_of(tiny_onnx, tmp_path / "model.engine")
    folder = triton_bundle(tiny_onnx, tmp_path / "repository", engine).folder
    config = parsed((folder / "config.pbtxt").read_text())
    assert config.name == folder.name == "pmm_resnet18_trt"
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 32)
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 32]
    assert [path.name for path in (folder / "1").iterdir()] == ["model.plan"]


def test_an_engine_is_served_only_with_the_file_that_describes_it(
    tiny_onnx: Path, raw_onnx: Path, tmp_path: Path
) -> None:
    def refuses(engine: Path, message: str) -> None:
        with pytest.raises(PmmError, match=message):
            triton_bundle(tiny_onnx, tmp_path / "repository", engine)

    refuses(tmp_path / "none.engine", r"none\.engine does not exist")
    refuses(
        engine_of(raw_onnx, tmp_path / "raw.engine"), r"raw\.engine was not built from .*model\.onnx, .* Build it: pmm"
    )
    cut = engine_of(tiny_onnx, tmp_path / "cut.engine")
    cut.write_bytes(b"engin")
    refuses(cut, "truncated")
    lone = engine_of(tiny_onnx, tmp_path / "lone.engine", BatchProfile(4, 8, 16))
    refuses(lone, r"cannot answer a lone request in Triton\. Build it with --batch 1,8,16")
    assert not (tmp_path / "repository").exists()


def test_names_tell_networks_apart(spec: ModelSpec) -> None:
    int8 = replace(spec, precision="int8", target="tensorrt")
    assert model_name(spec, as_engine=False) == "pmm_resnet18"
    assert model_name(int8, as_engine=False) == "pmm_resnet18_int8"
    assert model_name(int8, as_engine=True) == "pmm_resnet18_int8_trt"
    assert model_name(replace(int8, target="cpu"), as_engine=False) == "pmm_resnet18_int8_cpu"


def test_networks_of_one_repository(pmm: Callable, tiny_onnx: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    repository, fp16 = tmp_path / "models", tmp_path / "fp16.onnx"
    for source in ((tiny_onnx,), (tiny_checkpoint, "--out", fp16, "--precision", "fp16")):
        ended = pmm("export", *source, "--triton", repository)
        assert ended.exit_code == 0, ended.stderr
    ended = pmm("export", tiny_onnx, "--triton", repository, "--triton-name", "people.v2")
    assert ended.exit_code == 0, ended.stderr
    names = ["people.v2", "pmm_resnet18", "pmm_resnet18_fp16"]
    assert sorted(path.name for path in repository.iterdir()) == names
    assert [parsed((repository / name / "config.pbtxt").read_text()).name for name in names] == names
    assert 'MODEL, HEIGHT, WIDTH, LARGEST_BATCH = "people.v2",' in (repository / "people.v2" / "client.py").read_text()


def test_a_static_batch_is_no_network_for_a_server_or_a_tracker(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for bundle, form in ((triton_bundle, "uint8"), (deepstream_bundle, "raw")):
        onnx = export_onnx(tiny_checkpoint, tmp_path / "a.onnx", form, Graph(static_batch=4)).path
        with pytest.raises(ModelError, match=r"takes batches of 4 alone.*Export it without --static-batch"):
            bundle(onnx, tmp_path / "folder")


def relabelled(onnx: Path, out: Path, **changes: object) -> Path:
    """The same graph with other claims in its spec."""
    model = onnx_package.load(onnx)
    metadata = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    metadata.value = replace(ModelSpec.from_json(metadata.value), **changes).to_json()
    onnx_package.save(model, out)
    return out


def test_int8_for_cpus_goes_nowhere_near_tensorrt(tiny_onnx: Path, raw_onnx: Path, tmp_path: Path) -> None:
    cpu = {"precision": "int8", "target": "cpu"}
    raw, uint8 = (relabelled(onnx, tmp_path / onnx.name, **cpu) for onnx in (raw_onnx, tiny_onnx))
    with pytest.raises(ModelError, match=r"is INT8 for CPUs.*Export it with --target tensorrt"):
        deepstream_bundle(raw, tmp_path / "d")
    with pytest.raises(ModelError, match="is INT8 for CPUs"):
        triton_bundle(uint8, tmp_path / "t", engine_of(uint8, tmp_path / "x.engine"))
    assert triton_bundle(uint8, tmp_path / "t").folder.name == "pmm_resnet18_int8_cpu"


@pytest.mark.parametrize(("normalized", "said"), [(False, "are longer"), (True, "have it already, and this leaves")])
def test_what_is_said_of_the_embeddings_length_holds(
    normalized: bool, said: str, raw_onnx: Path, tmp_path: Path
) -> None:
    onnx = relabelled(raw_onnx, tmp_path / "a.onnx", normalized_output=normalized)
    folder = deepstream_bundle(onnx, tmp_path / "tracker").folder
    for name in ("README.md", "reid_section.yml", "config_tracker_NvDCF.yml"):
        text = " ".join((folder / name).read_text().replace("#", "").split())
        assert f"vectors of length 1; the network's {said}" in text, name
    assert yaml.safe_load((folder / "config_tracker_NvDCF.yml").read_text())["ReID"]["addFeatureNormalization"] == 1


def test_other_inputs_and_batches(spec: ModelSpec) -> None:
    raw = replace(spec, input=replace(spec.input, form="raw"))
    config = parsed(model_config(raw, "m", "onnxruntime_onnx", (1, 1)))
    assert config.input[0].data_type == model_config_pb2.TYPE_FP32
    assert list(config.input[0].dims) == [3, 96, 64]
    assert list(config.dynamic_batching.preferred_batch_size) == [1]
    with pytest.raises(PmmError, match="a preferred batch of 8 does not fit a largest of 4"):
        model_config(spec, "m", "onnxruntime_onnx", (8, 4))


@pytest.fixture
def server(triton: Path) -> Iterator[str]:
    """Triton's own gRPC service, answered by ONNX Runtime: what the client sends goes into the network as it is."""
    session = onnxruntime.InferenceSession(triton / "1" / "model.onnx", providers=["CPUExecutionProvider"])

    class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
        def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
            (sent,) = request.inputs
            assert (request.model_name, sent.datatype) == (triton.name, "UINT8")
            images = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(sent.shape)
            (embeddings,) = session.run(None, {sent.name: images})
            response = service_pb2.ModelInferResponse(model_name=request.model_name)
            response.outputs.add(name="embeddings", datatype="FP32", shape=embeddings.shape)
            response.raw_output_contents.append(embeddings.tobytes())
            return response

    service = grpc.server(ThreadPoolExecutor(1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    yield f"127.0.0.1:{port}"
    service.stop(None).wait()


def test_the_client_ranks_images_as_the_network_does(
    server: str, triton: Path, tiny_onnx: Path, tiny_dataset: Path
) -> None:
    images = sorted((tiny_dataset / "query").iterdir())[:5]
    command = [sys.executable, triton / "client.py", "--url", server, *images]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    embeddings = pmm_edge.runtime.embed_files(pmm_edge.load(tiny_onnx, "cpu"), images).embeddings
    distances = np.linalg.norm(embeddings - embeddings[0], axis=1)
    printed = [line.split(maxsplit=1) for line in ended.stdout.splitlines()]
    assert [path for _, path in printed] == [str(images[index]) for index in np.argsort(distances, kind="stable")]
    np.testing.assert_allclose([float(value) for value, _ in printed], np.sort(distances), atol=2e-3)


def test_bundles_take_the_form_they_feed(tiny_onnx: Path, raw_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"form uint8, the bundle feeds raw\. Export it with --input raw"):
        deepstream_bundle(tiny_onnx, tmp_path / "d")
    with pytest.raises(ModelError, match="form raw, the bundle feeds uint8"):
        triton_bundle(raw_onnx, tmp_path / "t")
    with pytest.raises(ModelError, match=r"none\.onnx does not exist"):
        deepstream_bundle(tmp_path / "none.onnx", tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tiny_onnx: Path, raw_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "other_model").mkdir()
    (tmp_path / "other_model" / "config.pbtxt").touch()
    triton_bundle(tiny_onnx, tmp_path)
    with pytest.raises(OutputError, match="pmm_resnet18 exists and is not an empty folder"):
        triton_bundle(tiny_onnx, tmp_path)
    with pytest.raises(OutputError, match="is not an empty folder"):
        deepstream_bundle(raw_onnx, tmp_path)


def test_pmm_export_writes_both(pmm: Callable, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "tracker", tmp_path / "repository"]
    out = tmp_path / "model.onnx"
    ended = pmm("export", tiny_checkpoint, "--out", out, "--deepstream", folders[0], "--triton", folders[1], "--json")
    assert ended.exit_code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["bundles"] == {"deepstream": str(folders[0]), "triton": str(folders[1] / "pmm_resnet18")}
    assert [Path(item["path"]).name for item in printed["exported"]] == ["model.onnx", "model-raw.onnx"]
    assert pmm_edge.load(folders[0] / "reid.onnx", "cpu").spec.input.form == "raw"
    ended = pmm("export", out, "--deepstream", tmp_path / "again")
    assert ended.exit_code == 2
    assert "Export it with --input raw" in ended.stderr


def test_a_bundle_that_fails_does_not_keep_the_other_from_being_written(
    tiny_onnx: Path, raw_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OutputError("cannot write tracker: No space left on device")

    monkeypatch.setattr("pmm_edge.export.exporter.deepstream_bundle", full)
    forms = {"uint8": tiny_onnx, "raw": raw_onnx}
    plan = Plan(forms, False, None, (), deepstream=tmp_path / "d", triton=tmp_path / "models" / "people")
    made = carry_out(Asked(tiny_onnx), plan)
    assert [bundle.folder for bundle in made.bundles] == [tmp_path / "models" / "people"]
    assert [str(failure) for failure in made.failures] == ["cannot write tracker: No space left on device"]


def test_a_bundle_from_an_exported_file_needs_no_torch(raw_onnx: Path, tmp_path: Path) -> None:
    script = """
import sys
for absent in ("torch", "torchvision", "onnx", "onnxscript", "safetensors"):
    sys.modules[absent] = None
from pmm_edge.cli import main
main()
"""
    command = [sys.executable, "-c", script, "export", raw_onnx, "--deepstream", tmp_path / "tracker"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "tracker" / "reid.onnx").read_bytes() == raw_onnx.read_bytes()
