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


def test_deterministic_mode_ends_with_its_block():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
