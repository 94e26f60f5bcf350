import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.trainer.config import PRESETS
from pmm_edge.trainer.device import choose_device, choose_precision, deterministic, memory_errors_explained
from pmm_edge.trainer.distributed import World
from pmm_edge.trainer.setup import chosen_machine


def test_a_gpu_that_is_not_there_is_one_clear_line():
    with pytest.raises(PmmError, match=r"cuda:63 is not there.*--device cpu"):
        choose_device("cuda:63")


def test_a_precision_that_is_named_is_taken():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) is torch.float32
    assert choose_precision("bf16", cpu) is torch.bfloat16


def test_fp16_is_refused_where_it_is_computed_in_software():
    with pytest.raises(PmmError, match=r"fp16 trains on a GPU only.*bf16 or fp32"):
        choose_precision("fp16", torch.device("cpu"))


def test_batch_norm_between_processes_is_refused_on_the_cpu():
    config = replace(PRESETS["quick"], sync_batch_norm=True, device="cpu", precision="fp32")
    with pytest.raises(PmmError, match=r"batch norm cannot be synchronised on the CPU.*--no-sync-batch-norm"):
        chosen_machine(config, World(0, 2, 0))
    assert chosen_machine(config, World()) == (torch.device("cpu"), torch.float32), "alone it has nothing to do"


COMPILE = """
import torch
from pmm_edge.trainer.device import compiler_errors_explained
module = torch.nn.Linear(2, 2)
module.compile()
try:
    with compiler_errors_explained():
        module(torch.zeros(1, 2))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_compiling_without_a_compiler_says_what_to_install(tmp_path):
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("PmmError --compile needs a C++ compiler, and none was found. Install one"), done


def test_a_device_that_does_not_train_is_refused():
    for name in ("mps", "meta", "tpu9"):
        with pytest.raises(PmmError, match="Choose auto, cpu, cuda or cuda:N"):
            choose_device(name)


@pytest.mark.parametrize(
    ("batch", "unit", "remedy"),
    [(64, 4, "--batch 32, or --accumulate 2"), (40, 8, "--batch 16, or"), (8, 4, "a smaller backbone or input")],
)
def test_memory_that_does_not_suffice_names_what_to_try(batch, unit, remedy):
    with (
        pytest.raises(PmmError, match=rf"a batch of {batch} does not fit.*{remedy}"),
        memory_errors_explained(torch.device("cuda:0"), batch, unit),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "numbers", [lambda: torch.empty(1 << 60), lambda: np.empty(1 << 60, np.uint8)], ids=["torch", "numpy"]
)
def test_memory_of_the_machine_that_does_not_suffice_names_what_to_try(numbers):
    with (
        pytest.raises(PmmError, match=r"a batch of 64 does not fit into the memory of this machine\. Try --batch 32"),
        memory_errors_explained(torch.device("cpu"), 64, 4),
    ):
        numbers()


def test_an_error_that_is_none_of_memory_is_left_as_it_is():
    with pytest.raises(RuntimeError, match="size of tensor"), memory_errors_explained(torch.device("cpu"), 64, 4):
        torch.zeros(2) + torch.zeros(3)


def test_deterministic_mode_ends_with_its_block():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
