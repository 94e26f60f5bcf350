import pytest
import torch

from pmm_edge.errors import PmmError
from pmm_edge.trainer.device import choose_device, choose_precision, deterministic, memory_errors_explained


def test_a_gpu_that_is_not_there_is_one_clear_line():
    with pytest.raises(PmmError, match=r"cuda:63 is not there.*--device cpu"):
        choose_device("cuda:63")


def test_a_precision_that_is_named_is_taken():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) is torch.float32
    assert choose_precision("bf16", cpu) is torch.bfloat16
    assert choose_precision("auto", cpu) in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("batch", "unit", "fitting"), [(64, 4, 32), (24, 8, 16), (8, 4, 8)])
def test_memory_that_does_not_suffice_names_a_batch_to_try(batch, unit, fitting):
    with (
        pytest.raises(PmmError, match=rf"a batch of {batch} does not fit.*--batch {fitting}, or --accumulate 2"),
        memory_errors_explained(torch.device("cuda:0"), batch, unit),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_deterministic_mode_ends_with_its_block():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
