"""Training on a real GPU: `pytest -m gpu tests/trainer`. The other tests take the same steps on a CPU."""

from dataclasses import replace

import pytest
import torch

from pmm_edge.model import build_model
from pmm_edge.trainer.config import TrainConfig
from pmm_edge.trainer.step import Shard, prepare, set_learning_rate, train_step
from pmm_edge.trainer.train import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")]
CONFIG = TrainConfig(
    backbone="resnet18", backbone_weights="none", height=96, width=64, mix_blocks=1, batch=8, erase_size=16
)


TEACHER_SIZE = 24


def trainee_of(config, dtype, teacher_size=None):
    device = torch.device("cuda")
    torch.manual_seed(0)
    network = build_model(config.method, num_classes=2, backbone="resnet18", height=96, width=64, mix=config.mix)
    crops = torch.randint(0, 256, (8, 96, 64, 3), dtype=torch.uint8).to(device)
    pids = (torch.arange(8) // 4).to(device)
    targets = None if teacher_size is None else torch.randn(8, teacher_size, device=device)
    return prepare(network, config, device, dtype, teacher_size=teacher_size), [
        Shard(crops, pids, seed=0, targets=targets)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mix", ["a-hard-mix", "cutout", "cutmix", "a-cutmix", "dropblock", "none"])
def test_a_step_in_each_type_is_finite_and_moves_the_weights(mix, dtype):
    config = replace(CONFIG, mix=mix)
    trainee, shards = trainee_of(config, dtype)
    before = trainee.network.stage1.classifier.weight.detach().clone()
    # In float16 the first steps are skipped, until the loss is scaled so that no gradient overflows.
    losses = [train_step(trainee, shards, config)[0].item() for _ in range(12)]
    assert all(0 < loss < 200 for loss in losses)
    assert not torch.equal(before, trainee.network.stage1.classifier.weight)


@pytest.mark.parametrize("teacher_size", [None, TEACHER_SIZE])
def test_a_step_never_waits_for_the_gpu(teacher_size):
    config = CONFIG if teacher_size is None else replace(CONFIG, method="baseline")
    trainee, shards = trainee_of(config, torch.bfloat16, teacher_size)
    for ready in (2, 4):  # the third step runs kernel by kernel, the seventh replays a CUDA graph
        for _ in range(ready):
            train_step(trainee, shards, config)
        torch.cuda.set_sync_debug_mode("error")
        try:
            set_learning_rate(trainee, 1e-4)
            train_step(trainee, shards, config)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", ["pmm", "bdb", "pcb", "cama", "baseline"])  # the baseline with a teacher
def test_a_replayed_step_is_the_step(method, accumulate, monkeypatch):
    """Other images, identities, seeds and learning rates in each step; the fifth step is smaller than the others."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config, losses, teacher_size = replace(CONFIG, method=method), [], TEACHER_SIZE if method == "baseline" else None
    torch.use_deterministic_algorithms(True)
    try:
        for replayed in (True, False):
            trainee, _ = trainee_of(config, torch.float32, teacher_size)
            trainee.step_graph = trainee.step_graph if replayed else None
            source, taken = torch.Generator("cuda").manual_seed(1), []
            for number in range(9):
                set_learning_rate(trainee, 2.0 ** -(14 + number % 3))  # exact in float32
                size = 4 if number == 4 else 8
                shards = [
                    Shard(
                        torch.randint(0, 256, (size, 96, 64, 3), dtype=torch.uint8, device="cuda", generator=source),
                        (torch.arange(size, device="cuda") // 2 + number) % 2,
                        seed=10 * number + part,
                        targets=teacher_size and torch.randn(size, teacher_size, device="cuda", generator=source),
                    )
                    for part in range(accumulate)
                ]
                taken.append(train_step(trainee, shards, config)[0])
            losses.append([loss.item() for loss in taken])
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 9


def test_a_compiled_backbone_gives_the_same_loss():
    losses = []
    for config in (CONFIG, replace(CONFIG, compile=True)):
        trainee, shards = trainee_of(config, torch.float32)
        losses.append(train_step(trainee, shards, config)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_whole_run(tiny_dataset, tmp_path):
    config = replace(CONFIG, epochs=2, evaluate_every=1)
    assert train(tiny_dataset, config=config, out=tmp_path / "run", device=0).finished
    assert (tmp_path / "run" / "best.pt").is_file()
