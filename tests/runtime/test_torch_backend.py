"""PyTorch as the reference: full FP32, and errors of one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.runtime.torch_backend import TorchEmbedder, is_out_of_memory, without_tf32

CROPS = np.zeros((3, 96, 64, 3), np.uint8)


@pytest.fixture
def embedder(tiny_checkpoint: Path) -> TorchEmbedder:
    loaded = pmm_edge.load(tiny_checkpoint, "cpu")
    assert isinstance(loaded, TorchEmbedder)
    return loaded


def test_a_batch_larger_than_memory(embedder: TorchEmbedder) -> None:
    endless = np.broadcast_to(CROPS[:1], (10**13, 96, 64, 3))
    with pytest.raises(ModelError) as caught:
        embedder.embed_prepared(endless)
    assert is_out_of_memory(caught.value.__cause__)
    assert "10000000000000" in caught.value.problem
    assert embedder.embed_prepared(CROPS).shape == (3, 1536)  # a smaller batch still runs


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"), True),
        (RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"), False),
        (RuntimeError(), False),
    ],
)
def test_errors_of_torch_become_one_line(error: Exception, full: bool, embedder: TorchEmbedder) -> None:
    class Network(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    embedder.network = Network()
    normalized = np.zeros((3, 3, 96, 64), np.float32)
    for embed in (lambda: embedder.embed_prepared(CROPS), lambda: embedder.embed_normalized(normalized)):
        with pytest.raises(ModelError) as caught:
            embed()
        assert "\n" not in str(caught.value)
        assert str(embedder.path) in caught.value.problem
        assert ("smaller batch" in caught.value.remedy) == full


def test_tf32_is_off_and_restored() -> None:
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before, products.allow_tf32 = products.allow_tf32, True
    try:
        with convolutions.flags(enabled=True, allow_tf32=True):
            with without_tf32():
                assert (products.allow_tf32, convolutions.allow_tf32) == (False, False)
            assert (products.allow_tf32, convolutions.allow_tf32) == (True, True)
    finally:
        products.allow_tf32 = before
