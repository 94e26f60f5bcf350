"""Device, precision, and plain messages for what torch reports about them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.device import World, choose_machine, torch_errors_explained

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch=32, device="cpu", precision="fp32")


@pytest.mark.parametrize("name", ["cuda:63", "63", "mps", "meta", "tpu9"])
def test_a_device_that_does_not_exist_is_refused(name):
    with pytest.raises(PmmError):
        choose_machine(replace(CONFIG, device=name), World())


@pytest.mark.parametrize(
    ("name", "rank", "gpus", "device"),
    [
        *(("auto", 1, 2, "cuda:1"), ("cuda", 1, 2, "cuda:1"), ("cuda:0", 1, 2, "cuda:0"), ("0", 1, 2, "cuda:0")),
        *(("cpu", 1, 2, "cpu"), ("auto", 0, 0, "cpu")),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, name, rank, gpus, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert choose_machine(replace(CONFIG, device=name), World(local_rank=rank))[0] == torch.device(device)


def test_precision_and_batch_norm_must_suit_the_device():
    assert choose_machine(CONFIG, World()) == (CPU, torch.float32)
    assert choose_machine(replace(CONFIG, precision="bf16"), World()) == (CPU, torch.bfloat16)
    assert choose_machine(replace(CONFIG, sync_batch_norm=True), World())[0] == CPU, "no effect in one process"
    with pytest.raises(PmmError):
        choose_machine(replace(CONFIG, precision="fp16"), World())
    with pytest.raises(PmmError):
        choose_machine(replace(CONFIG, sync_batch_norm=True), World(0, 2, 0))


def gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("allocate", "batch", "accumulate", "remedy"),
    [
        (gpu_memory, 64, 1, "--batch 32, or --accumulate 2"),
        (lambda: torch.empty(1 << 60), 40, 2, "--batch 16, or --accumulate 4"),
        (lambda: np.empty(1 << 60, np.uint8), 8, 1, "backbone"),
    ],
)
def test_too_little_memory_is_one_line_with_a_remedy_that_can_be_split(allocate, batch, accumulate, remedy):
    config = replace(CONFIG, batch=batch, accumulate=accumulate)
    with pytest.raises(PmmError) as caught, torch_errors_explained(CPU, config, World()):
        allocate()
    assert str(batch) in caught.value.problem and remedy in caught.value.remedy


def test_a_failed_compilation_is_one_line():
    from torch._dynamo.exc import BackendCompilerFailed

    with pytest.raises(PmmError) as caught, torch_errors_explained(CPU, replace(CONFIG, compile=True), World()):
        raise BackendCompilerFailed(lambda: None, RuntimeError("no compiler"), None)
    assert "--compile" in caught.value.remedy
