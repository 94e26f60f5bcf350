"""A network that distinguishes images, for tests that judge its exports."""

from dataclasses import replace
from pathlib import Path

import pytest

from pmm_edge.export import export


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that distinguishes the images, because its batch normalization has seen them."""
    import broken  # imports torch, as the export of a checkpoint does
    import torch
    from torch import nn

    from pmm_edge.model import Checkpoint, load_checkpoint, save_checkpoint
    from pmm_edge.runtime.torch_backend import Preprocess

    tiny = load_checkpoint(tiny_checkpoint)
    network = tiny.network().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.train()
            module.momentum = 0.5
    images = torch.tensor(broken.crops_of(tiny_dataset / "bounding_box_train"))
    with torch.no_grad():
        network(Preprocess(replace(tiny.spec.input, form="uint8"))(images))
    path = tmp_path_factory.mktemp("sharp") / "best.pt"
    save_checkpoint(path, Checkpoint(tiny.spec, network.state_dict()))
    return path


@pytest.fixture(scope="session")
def good(checkpoint: Path) -> Path:
    """Its export in FP32."""
    return export(checkpoint, out=checkpoint.with_name("model.onnx")).files[0].path
