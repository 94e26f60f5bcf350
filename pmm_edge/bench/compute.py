"""What a network must compute, counted from its spec alone, and how much of the machine's peak that is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

from pmm_edge.bench.figures import Compute, Latency
from pmm_edge.errors import ModelError
from pmm_edge.runtime.embedder import parse_device
from pmm_edge.spec import ModelSpec

_BASIC, _BOTTLENECK = 1, 4
RESNETS = {
    "resnet18": (_BASIC, (2, 2, 2, 2)),
    "resnet34": (_BASIC, (3, 4, 6, 3)),
    "resnet50": (_BOTTLENECK, (3, 4, 6, 3)),
    "resnet101": (_BOTTLENECK, (3, 4, 23, 3)),
}
"""Expansion of a block, and the blocks of each stage (He et al. 2016, table 1)."""
_STRIDES = (1, 2, 2, 1)
"""Of the stages; the last keeps its resolution (paper section 2.1)."""
_EXTRA_BOTTLENECK = ("pmm", "bdb")
PEAK_SECONDS = 0.3
_LEAST_PRODUCT_SECONDS = 0.02


@dataclass(frozen=True)
class Product:
    """A convolution or a linear layer, its batch normalisation folded in."""

    inputs: int
    outputs: int
    kernel: int = 1
    positions: int = 1
    """Of the map that it gives."""

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return self.inputs * self.outputs * self.kernel**2 + self.outputs

    @property
    def operations(self) -> int:
        """A multiplication and an addition for each weight at each position; biases are left out, as is usual."""
        return 2 * self.inputs * self.outputs * self.kernel**2 * self.positions


def products(spec: ModelSpec) -> Iterator[Product]:
    """All convolutions and linear layers of the deployed network, in their order; whatever else it does is below 1 %.

    Raises:
        ModelError: the spec names a backbone that is none of this project's.
    """
    if spec.backbone not in RESNETS:
        raise ModelError(
            f"the operations of a backbone '{spec.backbone}' are not known", f"Known are {', '.join(RESNETS)}"
        )
    expansion, stages = RESNETS[spec.backbone]
    size = _half(spec.input.height), _half(spec.input.width)
    yield Product(3, 64, 7, prod(size))
    size = _half(size[0]), _half(size[1])  # the max pooling
    channels = 64
    for stage, (blocks, stage_stride) in enumerate(zip(stages, _STRIDES, strict=True)):
        for block in range(blocks):
            stride = stage_stride if block == 0 else 1
            yield from _block(channels, 64 * 2**stage, expansion, size, stride)
            size = (_half(size[0]), _half(size[1])) if stride == 2 else size
            channels = 64 * 2**stage * expansion
    if spec.architecture in _EXTRA_BOTTLENECK:
        yield from _block(channels, channels // _BOTTLENECK, _BOTTLENECK, size, 1)
    yield Product(channels, spec.embedding_size)  # the heads side by side


def compute_of(spec: ModelSpec, latencies: Sequence[Latency], device: str) -> Compute:
    """A network's operations and parameters, and the share of the measured peak that an engine reaches with them.

    Args:
        latencies: of this model; those of scope `model` count.
        device: that they were measured on: `cpu` or `cuda:N`.

    Raises:
        ModelError: the spec names a backbone that is none of this project's.
    """
    layers = list(products(spec))
    gflops = sum(layer.operations for layer in layers) / 1e9
    speeds = [found.images_per_second for found in latencies if found.scope == "model"]
    peak = measured_peak(device)
    return Compute(
        gflops=gflops,
        parameters=sum(layer.parameters for layer in layers),
        peak_gflops_per_second=peak,
        share_of_peak=gflops * max(speeds) / peak if peak and speeds else None,
    )


@cache
def measured_peak(device: str) -> float | None:
    """GFLOP/s of a large FP32 matrix product: numpy's on the CPU, on a GPU that of a PyTorch that is loaded.

    Returns:
        The fastest of several, measured at the first call for this device; None for a GPU without PyTorch.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return _fastest_product(_NumpyProduct)
    # Loading PyTorch takes seconds, and libraries of CUDA's that may not be those the engine runs on.
    if "torch" not in sys.modules:
        return None
    import torch

    from pmm_edge.runtime.torch_backend import without_tf32

    if index >= torch.cuda.device_count():
        return None

    class TorchProduct:
        def __init__(self, side: int) -> None:
            self.left, self.right = torch.rand(2, side, side, device=f"cuda:{index}")

        def run(self) -> None:
            torch.matmul(self.left, self.right)
            torch.cuda.synchronize(index)

    with without_tf32():
        return _fastest_product(TorchProduct)


class _NumpyProduct:
    def __init__(self, side: int) -> None:
        self.left, self.right = np.random.default_rng(0).random((2, side, side), np.float32)
        self.out = np.empty((side, side), np.float32)

    def run(self) -> None:
        np.matmul(self.left, self.right, out=self.out)


def _fastest_product(make: type) -> float:
    """Matrices as large as it takes for a product to last, for only then all cores are busy nearly all of the time."""
    side = 512
    while True:
        product = make(side)
        product.run()
        if (seconds := _seconds(product)) >= _LEAST_PRODUCT_SECONDS or side >= 16384:
            break
        side *= 2
    until = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < until:
        seconds = min(seconds, _seconds(product))
    return 2 * side**3 / seconds / 1e9


def _seconds(product: _NumpyProduct) -> float:
    start = time.perf_counter()
    product.run()
    return time.perf_counter() - start


def _block(channels: int, width: int, expansion: int, size: tuple[int, int], stride: int) -> Iterator[Product]:
    """A residual block of torchvision's: the bottleneck has its stride in the 3×3 convolution."""
    before = prod(size)
    behind = _half(size[0]) * _half(size[1]) if stride == 2 else before
    outputs = width * expansion
    if expansion == _BASIC:
        yield Product(channels, width, 3, behind)
        yield Product(width, outputs, 3, behind)
    else:
        yield Product(channels, width, 1, before)
        yield Product(width, width, 3, behind)
        yield Product(width, outputs, 1, behind)
    if stride != 1 or channels != outputs:
        yield Product(channels, outputs, 1, behind)


def _half(side: int) -> int:
    """What a padded kernel with stride 2 leaves."""
    return -(-side // 2)
