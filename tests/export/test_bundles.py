"""DeepStream and Triton folders follow from the spec, and parse as their own formats."""

import subprocess
import sys
from collections.abc import Iterator
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
from pmm_edge.errors import ModelError, OutputError
from pmm_edge.export import ExportResult, export
from pmm_edge.export.bundles import deepstream_bundle, triton_bundle
from pmm_edge.retrieval.distances import cosines
from pmm_edge.spec import (
    METADATA_KEY,
    Calibration,
    DistanceThresholds,
    ModelSpec,
    Quantization,
    RetrievalFigures,
    Threshold,
)


@pytest.fixture(scope="module")
def deepstream(fp32_export: ExportResult) -> Path:
    return fp32_export.bundles["deepstream"]


@pytest.fixture(scope="module")
def triton(fp32_export: ExportResult) -> Path:
    return fp32_export.bundles["triton"]


@pytest.fixture(scope="module")
def spec(tiny_onnx: Path) -> ModelSpec:
    return pmm_edge.load(tiny_onnx, "cpu").spec


def relabeled(onnx: Path, out: Path, **changes: object) -> Path:
    """The same graph with another spec."""
    model = onnx_package.load(onnx)
    metadata = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    spec = replace(ModelSpec.from_json(metadata.value), **changes)
    onnx_package.helper.set_model_props(model, {METADATA_KEY: spec.to_json()})  # without the digest
    onnx_package.save(model, out)
    return out


def parsed(config: Path) -> Any:
    return text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())


def test_reid_section_follows_from_the_spec(deepstream: Path) -> None:
    spec = pmm_edge.load(deepstream / "reid.onnx", "cpu").spec
    config = yaml.safe_load((deepstream / "config_tracker_NvDCF.yml").read_text())
    assert config["ReID"] == yaml.safe_load((deepstream / "reid_section.yml").read_text())["ReID"]
    assert config["ReID"] == {
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
    assert config.pop("ReID") and config["TrajectoryManagement"]["enableReAssoc"] == 1
    parts = "BaseConfig DataAssociator StateEstimator TargetManagement TrajectoryManagement VisualTracker"
    assert " ".join(sorted(config)) == parts
    assert all(isinstance(value, int | float) for part in config.values() for value in part.values())


def test_input_of_the_tracker_gives_the_embeddings(deepstream: Path, tiny_onnx: Path, crops: np.ndarray) -> None:
    """The tracker's arithmetic, with the values of its configuration."""
    reid = yaml.safe_load((deepstream / "reid_section.yml").read_text())["ReID"]
    offsets = np.array(reid["offsets"], np.float32)[:, None, None]
    planes = np.float32(reid["netScaleFactor"]) * (crops.transpose(0, 3, 1, 2).astype(np.float32) - offsets)
    session = onnxruntime.InferenceSession(deepstream / reid["onnxFile"], providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, {"images": planes})
    assert embeddings.shape[1] == reid["reidFeatureSize"]
    np.testing.assert_allclose(embeddings, pmm_edge.load(tiny_onnx, "cpu").embed(crops), rtol=1e-4, atol=1e-4)


def test_readmes_state_retrieval_by_the_distance_of_the_consumer(
    raw_onnx: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    figures = {
        "retrieval": RetrievalFigures(0.675, 0.493, 0, 0),
        "retrieval_cosine": RetrievalFigures(0.6, 0.484, 0, 0),
    }
    for known in ({}, figures):
        for onnx, bundle in ((raw_onnx, deepstream_bundle), (tiny_onnx, triton_bundle)):
            folder = tmp_path / f"{onnx.stem}{len(known)}"
            bundle(relabeled(onnx, tmp_path / "x.onnx", **known), folder)
            text = (folder / "README.md").read_text()
            assert ("48.4 %" in text, "49.3 %" in text) == (bool(known), bool(known))
            assert ("--distance cosine" in text) == (not known)


def test_thresholds_are_in_the_distance_of_the_consumer(raw_onnx: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    rates = [Threshold(fmr, distance, 9, (0, 1), 0.1234, (0, 1)) for fmr, distance in ((1e-2, 0.3), (1e-3, 0.12345))]
    euclidean = DistanceThresholds(0.1, (replace(rates[0], distance=17.5),))
    known = Calibration("people", "", 20, 9, 9000, 1536, euclidean, DistanceThresholds(0.1, tuple(rates)))
    for found, cosine in ((None, 0.8), (known, 0.8766), (replace(known, cosine=euclidean), 0.0)):
        folders = [tmp_path / f"{name}{cosine}" for name in ("deepstream", "triton")]
        for onnx, bundle, folder in zip(
            (raw_onnx, tiny_onnx), (deepstream_bundle, triton_bundle), folders, strict=True
        ):
            bundle(relabeled(onnx, tmp_path / "x.onnx", calibration=found), folder)
        config = yaml.safe_load((folders[0] / "config_tracker_NvDCF.yml").read_text())
        assert config["TrajectoryManagement"]["minMatchingScore4ReidSimilarity"] == cosine
        texts = [(folder / "README.md").read_text() for folder in folders]
        assert ["pmm calibrate" in text for text in texts] == [found is None] * 2
        if found is known:
            assert ["0.1235" in text for text in texts] == [True, True]
            assert ["| euclidean | 17.5 | 0.01 | 12.3 % |" in text for text in texts] == [False, True]


def test_network_mode_is_the_precision(raw_onnx: Path, tmp_path: Path) -> None:
    for mode, precision in enumerate(("fp32", "fp16", "int8")):
        deepstream_bundle(relabeled(raw_onnx, tmp_path / "x.onnx", precision=precision), tmp_path / precision)
        reid = yaml.safe_load((tmp_path / precision / "reid_section.yml").read_text())["ReID"]
        assert (reid["networkMode"], reid["modelEngineFile"]) == (mode, f"reid.onnx_b100_gpu0_{precision}.engine")


def test_triton_configuration_parses_and_matches_the_network(triton: Path, spec: ModelSpec) -> None:
    config = parsed(triton / "config.pbtxt")
    assert config.name == triton.name == "pmm_resnet18"
    assert (config.platform, config.max_batch_size) == ("onnxruntime_onnx", 64)
    session = onnxruntime.InferenceSession(triton / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    for (tensor,), (declared,), kind in (
        (session.get_inputs(), config.input, model_config_pb2.TYPE_UINT8),
        (session.get_outputs(), config.output, model_config_pb2.TYPE_FP32),
    ):
        assert (declared.name, declared.data_type) == (tensor.name, kind)
        assert list(declared.dims) == tensor.shape[1:]
    assert list(config.dynamic_batching.preferred_batch_size) == [16, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert ModelSpec.from_json(config.parameters[METADATA_KEY].string_value) == spec


def test_spec_in_the_triton_configuration_is_escaped(tiny_onnx: Path, tmp_path: Path, spec: ModelSpec) -> None:
    dataset = 'Höhle "2"\n'
    triton_bundle(relabeled(tiny_onnx, tmp_path / "x.onnx", dataset=dataset), tmp_path / "model")
    read = ModelSpec.from_json(parsed(tmp_path / "model" / "config.pbtxt").parameters[METADATA_KEY].string_value)
    assert read == replace(spec, dataset=dataset)


def test_models_share_a_repository(tiny_onnx: Path, tmp_path: Path) -> None:
    for name in ("people.v2", None):
        folder = export(tiny_onnx, triton=tmp_path, triton_name=name).bundles["triton"]
        assert folder == tmp_path / (name or "pmm_resnet18")
        assert parsed(folder / "config.pbtxt").name == folder.name
    assert '"people.v2"' in (tmp_path / "people.v2" / "client.py").read_text()
    with pytest.raises(OutputError, match="pmm_resnet18"):
        export(tiny_onnx, triton=tmp_path)


def test_unsuitable_networks_are_rejected(tiny_onnx: Path, raw_onnx: Path, tmp_path: Path) -> None:
    cpu = {"precision": "int8", "quantization": Quantization("cpu", "minmax", 64)}
    raw, uint8 = (relabeled(onnx, tmp_path / onnx.name, **cpu) for onnx in (raw_onnx, tiny_onnx))
    for onnx, kind, trt in (
        (raw, "deepstream", False),
        (tiny_onnx, "deepstream", False),
        (tmp_path / "missing.onnx", "deepstream", False),
        (raw_onnx, "triton", False),
        (uint8, "triton", True),
    ):
        with pytest.raises(ModelError):
            export(onnx, trt=trt, **{kind: tmp_path / "folder"})
        assert not (tmp_path / "folder").exists()
    assert export(uint8, triton=tmp_path / "folder").bundles["triton"].name == "pmm_resnet18_int8_cpu"


@pytest.fixture
def server(triton: Path) -> Iterator[str]:
    """Triton's gRPC service, answered by ONNX Runtime: the request goes into the network as it is."""
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


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_client_ranks_images_by_their_embeddings(
    distance: str, server: str, triton: Path, tiny_onnx: Path, tiny_dataset: Path
) -> None:
    images = sorted((tiny_dataset / "query").iterdir())[:5]
    command = [sys.executable, triton / "client.py", "--url", server, "--distance", distance, *images]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    embeddings = pmm_edge.load(tiny_onnx, "cpu").embed(pmm_edge.images.read_crops(images, 96, 64))
    if distance == "cosine":
        distances = 1 - cosines(embeddings, embeddings[[0] * 5])
    else:
        distances = np.linalg.norm(embeddings - embeddings[0], axis=1)
    printed = [line.split(maxsplit=1) for line in ended.stdout.splitlines()]
    assert [path for _, path in printed] == [str(images[index]) for index in np.argsort(distances, kind="stable")]
    np.testing.assert_allclose([float(value) for value, _ in printed], np.sort(distances), atol=2e-3)
