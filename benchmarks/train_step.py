"""Time of a training step of PMM, compared with textbook Grad-CAM in the same run.

The textbook step sends the true-class logits back through the whole network twice to get the gradient at the map (with
`retain_graph`, as Grad-CAM is usually written), and ranks and mixes blocks sample by sample. "mixing only" is Grad-CAM,
ranking and mixing of both stages on maps of the same size, forward and backward. The floor is the number of
floating-point operations of the step at the rate of a large matrix product. `gpu_check.py` uses these parts as well.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --dtype bf16 --batch 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from machine import machine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pmm_edge.console import print_line, print_table
from pmm_edge.model import PMM, StageOutput
from pmm_edge.model.backbone import map_size
from pmm_edge.model.mixing import draw_negatives, grad_cam, mix, top_blocks
from pmm_edge.model.network import average_pool, max_pool
from pmm_edge.runtime.torch_backend import torch_device
from pmm_edge.trainer.config import PRESETS, TrainConfig, choose_config
from pmm_edge.trainer.step import PAPER_EPOCHS, Shard, prepare, train_step

PRODUCT_SIDES = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product gives the rate of the floor."""
ADAM_BYTES = 28
"""Adam reads weight, gradient and both moments of a parameter and writes all but the gradient, in float32."""
MARKET_PEOPLE = 751
"""Training identities of Market-1501; an epoch draws as many images of each as a batch does."""


class TextbookPMM(PMM):
    """PMM with Grad-CAM as it is usually written: full backward passes, loops over samples."""

    def train_stages(self, features, pids, negatives, generator):
        features.retain_grad()
        unmixed = self.bottleneck(features)
        embedding, logits = self.stage1(average_pool(features))
        self._backward(logits, pids)
        negative = draw_negatives(pids, generator)
        stage1 = StageOutput(embedding, logits)
        mixed = self._mix_by_sample(unmixed, negative, self._cam(features))
        mixed.retain_grad()
        embedding, logits = self.stage2(max_pool(mixed))
        self._backward(logits, pids)
        negative = draw_negatives(pids, generator)
        stage2 = StageOutput(embedding, logits)
        mixed = self._mix_by_sample(unmixed, negative, self._cam(mixed))
        return stage1, stage2, StageOutput(*self.stage3(max_pool(mixed)))

    def _backward(self, logits: Tensor, pids: Tensor) -> None:
        logits.gather(1, pids[:, None]).sum().backward(retain_graph=True)

    def _cam(self, features: Tensor) -> Tensor:
        weights = features.grad.mean(dim=(2, 3), keepdim=True)
        return torch.relu((weights * features).sum(dim=1)).detach()

    def _mix_by_sample(self, features: Tensor, negatives: Tensor, cams: Tensor) -> Tensor:
        height, width = self.block_size
        keep = torch.ones_like(cams)
        for sample, cam in enumerate(cams):
            rows, columns = cam.shape
            corners = [(r, c) for r in range(0, rows, height) for c in range(0, columns, width)]
            sums = [float(cam[r : r + height, c : c + width].sum()) for r, c in corners]
            best = sorted(range(len(corners)), key=lambda i: sums[i], reverse=True)[: self.mix_blocks]
            for row, column in (corners[i] for i in best):
                keep[sample, row : row + height, column : column + width] = 0
        keep = keep[:, None]
        return keep * features + (1 - keep) * features[negatives]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()

    device = torch_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    operations = operations_of(options)
    steps = {
        "pmm train": step_of(PMM, options, device, dtype),
        "textbook Grad-CAM": step_of(TextbookPMM, options, device, dtype),
        "mixing only": _mixing(options, device, dtype),
        "floor": matrix_product(device, dtype),
    }
    # Interleaved, so that a drift of the machine affects all alike; the first round warms up.
    rounds = [{name: seconds(step, device) for name, step in steps.items()} for _ in range(options.repeat + 1)][1:]
    for taken in rounds:
        taken["floor"] *= operations / (2 * PRODUCT_SIDES[device.type] ** 3)

    print_line(machine("torch"))
    rows = []
    for name in steps:
        times = [taken[name] for taken in rounds]
        ratio = median(taken[name] / taken["pmm train"] for taken in rounds)
        rows.append((name, f"{median(times):.3f}", f"{min(times):.3f}", f"{ratio:.3f}"))
    work = f"{options.backbone} {options.height}x{options.width}, batch {options.batch}, {options.dtype} on {device}"
    print_table(work, ("", "seconds", "lowest", "ratio to pmm train"), rows)
    rate = operations / median(taken["floor"] for taken in rounds)
    print_line(f"floor: {operations / 1e9:.0f} GFLOP a step at {rate / 1e9:.0f} GFLOP/s; medians of {options.repeat}")
    steps_in_all = PAPER_EPOCHS * MARKET_PEOPLE * PRESETS["market1501"].images_per_identity / options.batch
    hours = steps_in_all * median(taken["pmm train"] for taken in rounds) / 3600
    print_line(f"the paper's {PAPER_EPOCHS} epochs on Market-1501 at this rate: {hours:.2g} hours")


def step_of(
    network: type[PMM],
    options: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool = False,
    graph: bool = True,
) -> Callable:
    """A function that takes a step of the paper's training; without `graph`, never as a CUDA graph."""
    torch.manual_seed(0)
    config = _config(options, compiled)
    trainee = prepare(network(MARKET_PEOPLE, options.backbone, config.mix_blocks), config, device, dtype)
    if network is TextbookPMM or not graph:
        trainee.step_graph = None  # the loops of the textbook wait for the GPU, which a graph cannot
    crops = torch.randint(0, 256, (options.batch, options.height, options.width, 3), dtype=torch.uint8).to(device)
    pids = (torch.arange(options.batch) // 4).to(device)
    return lambda: train_step(trainee, [Shard(crops, pids, seed=0)], config)


def _config(options: argparse.Namespace, compiled: bool = False) -> TrainConfig:
    settings = {"height": options.height, "width": options.width, "compile": compiled}
    return choose_config("market1501", settings={**settings, "erase_size": min(64, options.width)})


def _mixing(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Callable:
    network = PMM(MARKET_PEOPLE, options.backbone, _config(options).mix_blocks).to(device)
    shape = (options.batch, network.backbone.channels, *map_size(options.height, options.width))
    features = torch.rand(shape, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
    pids = (torch.arange(options.batch) // 4).to(device)
    pooled = [pool(features).detach().float().requires_grad_() for pool in (average_pool, max_pool)]
    logits = [head(vector)[1] for head, vector in zip((network.stage1, network.stage2), pooled, strict=True)]

    def run() -> tuple[Tensor, None]:
        for vector, scores in zip(pooled, logits, strict=True):
            cam = grad_cam(features, vector, scores, pids)
            replaced = top_blocks(cam, network.block_size, network.mix_blocks)
            mix(features, draw_negatives(pids), replaced).backward(features.detach())
        return cam.sum(), None

    return run


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable:
    side = PRODUCT_SIDES[device.type]
    left, right = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
    return lambda: ((left @ right)[0, 0], None)


def operations_of(options: argparse.Namespace) -> float:
    """Floating-point operations of a step: those of two images, scaled."""
    with FlopCounterMode(display=False) as counter:
        _forward_and_backward(options, 2, torch.float32)
    return counter.get_total_flops() * options.batch / 2


def traffic_of(options: argparse.Namespace, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a step must move, and bytes that it moves with a kernel for each operator.

    Both count every input and output of an operator once, and the update of the weights. The first one counts only
    convolutions and matrix products, as if all that lies between them (batch norm, ReLU, sums, pooling) were fused.
    """
    with _Traffic() as counter:
        parameters = _forward_and_backward(options, options.batch, dtype)
    return counter.products + ADAM_BYTES * parameters, counter.every + ADAM_BYTES * parameters


class _Traffic(TorchDispatchMode):
    products = every = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
            moved = sum(min(one.nbytes, one.untyped_storage().nbytes()) for one in tensors)  # less if it is expanded
            self.every += moved
            aten = torch.ops.aten
            if function.overloadpacket in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm):
                self.products += moved
        return output


def _forward_and_backward(options: argparse.Namespace, batch: int, dtype: torch.dtype) -> int:
    """Trace a step on the meta device, which computes nothing; return the number of parameters."""
    with torch.device("meta"):
        network = PMM(MARKET_PEOPLE, options.backbone).to(dtype)
        images = torch.empty(batch, 3, options.height, options.width, dtype=dtype)
    # Only convolutions and matrix products matter, so a sum over the logits of each head can replace the losses.
    features = network.backbone(images)
    maximum = max_pool(network.bottleneck(features))
    heads = zip(
        (network.stage1, network.stage2, network.stage3), (average_pool(features), maximum, maximum), strict=True
    )
    torch.stack([head(vector)[1].sum() for head, vector in heads]).sum().backward()
    return sum(parameter.numel() for parameter in network.parameters())


def seconds(step: Callable, device: torch.device, count: int = 1) -> float:
    """Seconds per step of `count` steps, after which the device is waited for."""
    start = time.perf_counter()
    for _ in range(count):
        loss, _ = step()
    loss.item()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count


if __name__ == "__main__":
    main()
