"""Other methods and backbones, exported in every precision; `export` compares each file with the checkpoint."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pmm_edge
from pmm_edge.export import export, quantize
from pmm_edge.model import Checkpoint, build_model, save_checkpoint
from pmm_edge.model.backbone import MOBILE
from pmm_edge.spec import InputSpec, ModelSpec


@pytest.fixture(scope="module", params=["pcb-rpp", "cama", "mobilenet_v3_small", "efficientnet_b0"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "trainer"))
        from tiny_training import CONFIG
    torch.manual_seed(0)
    method, _, rpp = request.param.partition("-")
    method, backbone = ("bdb", method) if method in MOBILE else (method, CONFIG.backbone)
    options = {"backbone": backbone, "rpp": bool(rpp), "embedding_size": 64}
    network = build_model(method, num_classes=4, height=96, width=32, **options)
    network.refined = bool(rpp)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    width = max(stop for _, stop in network.stages.values())
    spec = ModelSpec(method, backbone, 4, InputSpec(96, 32), width, network.stages, rpp=bool(rpp))
    path = tmp_path_factory.mktemp("methods") / "best.pt"
    save_checkpoint(path, Checkpoint(spec, network.state_dict()))
    return path


def test_precisions_targets_and_weights(
    checkpoint: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MAX_LOSS", 0.05)  # what export accepts: a search takes long
    trained = pmm_edge.load(checkpoint, "cpu")
    names = ("fp32", "cpu") if trained.spec.backbone == "efficientnet_b0" else ("fp32", "cpu", "tensorrt", "fp16")
    out = {name: tmp_path / f"{name}.onnx" for name in names}
    export(checkpoint, out=out["fp32"], safetensors=True)
    if "fp16" in out:
        export(checkpoint, out=out["fp16"], precision="fp16", calibration=people)
    options = {"precision": "int8", "calibration": people, "calibration_method": "minmax"}
    for target in names[1:3]:
        # Equal constants of network and normalization are stored once; their parts are still joined.
        export(checkpoint, out=out[target], target=target, normalize_output=target == "tensorrt", **options)
    images = torch.randint(0, 256, (3, 96, 32, 3), dtype=torch.uint8).numpy()
    expected = trained.embed(images)
    assert (pmm_edge.load(out["fp32"].with_suffix(".safetensors"), "cpu").embed(images) == expected).all()
    for path in out.values():
        embedder = pmm_edge.load(path, "cpu")
        assert embedder.spec.stages == trained.spec.stages
        assert embedder.embed(images).shape == expected.shape
