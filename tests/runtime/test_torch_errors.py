"""What torch raises while a network runs is one line of ours: at which batch, and what to do."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pmm_edge
from pmm_edge.errors import ModelError
from pmm_edge.runtime.torch_backend import TorchEmbedder

CROPS = np.zeros((3, 96, 64, 3), np.uint8)


@pytest.fixture
def embedder(tiny_checkpoint: Path) -> TorchEmbedder:
    loaded = pmm_edge.load(tiny_checkpoint, "cpu")
    assert isinstance(loaded, TorchEmbedder)
    return loaded


def failing(error: Exception) -> nn.Module:
    class Network(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise error

    return Network()


def refused(embedder: TorchEmbedder, message: str) -> None:
    for embed in (
        lambda: embedder.embed_prepared(CROPS),
        lambda: embedder.embed_normalized(np.zeros((3, 3, 96, 64), np.float32)),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            embed()
        assert "\n" not in str(caught.value)


def test_a_batch_that_no_memory_holds(embedder: TorchEmbedder) -> None:
    endless = np.broadcast_to(CROPS[:1], (10**13, 96, 64, 3))  # more than addresses reach
    with pytest.raises(ModelError, match=r"memory of this machine does not hold a batch of 10000000000000 of .*\.pt"):
        embedder.embed_prepared(endless)
    assert embedder.embed_prepared(CROPS).shape == (3, 1536)  # a smaller one runs, as the message says


def test_a_full_gpu_is_named(embedder: TorchEmbedder) -> None:
    embedder.device, embedder._target = "cuda:1", torch.device("meta")  # nothing here is on a GPU
    embedder.network = failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"))
    embedder._preprocess = nn.Identity()
    refused(embedder, r"memory of cuda:1 does not hold a batch of 3 of .*best\.pt in torch\. Choose a smaller batch")


def test_what_else_torch_raises_is_passed_on_in_one_line(embedder: TorchEmbedder) -> None:
    embedder.network = failing(RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"))
    refused(embedder, r"torch cannot run .*best\.pt at batch 3 on cpu \(CUDA error: an illegal memory access\)\. Try")
    embedder.network = failing(RuntimeError())
    refused(embedder, r"at batch 3 on cpu \(RuntimeError\)")
