"""FP16 whose sums are in float32 or float16, against FP32: the cosine to expect of an engine (docs/precision.md).

    python benchmarks/half_sums.py best.pt DATA [--images 400]

Every convolution and linear layer is computed in float16 like ONNX Runtime's kernels for Arm with FP16 instructions: a
fused multiply-add for each term, whose result is rounded to float16, and a new sum every 512 terms.

What to expect: with the unit roundoff u = 2^-11 of float16, rounding a value x adds an error of variance 0.18 u² x² on
average (uniform within half a unit of the last place, logarithmic mantissa). A sum of n terms of random sign has
partial sums with a mean square of k/n of the final one, so n roundings add 0.18 u² (1 + 2 + ... + n)/n = 0.09 n u².
Float32 sums leave three roundings, of the weight, the input and the output: 0.54 u². With n = 512 the ratio is 85.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from machine import machine
from torch import Tensor, nn

from pmm_edge.data.dataset import ReidDataset, Split, scan
from pmm_edge.export.graph import StrippedNetwork
from pmm_edge.images import evenly, read_crops
from pmm_edge.model import load_checkpoint
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime.embed_files import evaluate_dataset
from pmm_edge.runtime.torch_backend import Preprocess

TERMS = 512  # that the kernel sums before it starts again; MLAS_HALF_GEMM_KERNEL_NEON of onnxruntime 1.20 to 1.23


def half_sums(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K), plus (N,): all float16, every intermediate sum rounded to float16."""
    total = torch.zeros(len(rows), len(weight), dtype=torch.half)
    for start in range(0, rows.shape[1], TERMS):
        part = bias.repeat(len(rows), 1) if start == 0 else torch.zeros_like(total)
        for k in range(start, min(start + TERMS, rows.shape[1])):
            part.addcmul_(rows[:, k, None], weight[None, :, k])  # torch rounds once, after the addition
        total += part
    return total


def forward(layer: nn.Conv2d | nn.Linear, in_half: bool, inputs: Tensor) -> Tensor:
    """The layer with sums in float16 or, as x86 processors and GPUs have them, in float32; the output is float16."""
    bias = torch.zeros(len(layer.weight), dtype=torch.half) if layer.bias is None else layer.bias
    if isinstance(layer, nn.Linear):
        exact = partial(F.linear, weight=layer.weight.float(), bias=bias.float())
        return half_sums(inputs, layer.weight, bias) if in_half else exact(inputs.float()).half()
    geometry = {"stride": layer.stride, "padding": layer.padding}
    if not in_half:
        return F.conv2d(inputs.float(), layer.weight.float(), bias.float(), **geometry).half()
    columns = F.unfold(inputs.float(), layer.kernel_size, **geometry).half()  # (N, K, positions)
    sums = half_sums(columns.transpose(1, 2).flatten(0, 1), layer.weight.flatten(1), bias)
    size = (inputs.shape[2] + 2 * layer.padding[0] - layer.kernel_size[0]) // layer.stride[0] + 1
    return sums.unflatten(0, (len(inputs), -1)).transpose(1, 2).unflatten(2, (size, -1))


def subset(dataset: ReidDataset, images: int | None) -> ReidDataset:
    """At most `images` images of query and gallery, evenly spaced."""

    def part(split: Split) -> Split:
        share = len(split) * (images or 0) // (len(dataset.query) + len(dataset.gallery))
        return split.select(evenly(len(split), max(share, 1)))

    return replace(dataset, query=part(dataset.query), gallery=part(dataset.gallery)) if images else dataset


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("--images", type=int, help="use this many images of query and gallery")
    arguments = parser.parse_args()

    checkpoint, dataset = load_checkpoint(arguments.checkpoint), subset(scan(arguments.data), arguments.images)
    spec = replace(checkpoint.spec.input, form="uint8")
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    batches = [read_crops(paths[row : row + 64], spec.height, spec.width) for row in range(0, len(paths), 64)]
    images = [Preprocess(spec)(torch.tensor(pixels)) for pixels in batches]
    network = StrippedNetwork(checkpoint.network(), False).eval()
    expected = torch.cat([network(batch) for batch in images]).numpy()
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    print(machine("torch"))
    print(f"{len(layers)} layers with {sum(layer.weight[0].numel() for layer in layers):,} terms; {len(paths)} images")
    network.half()
    for in_half in (False, True):
        for layer in layers:
            layer.forward = partial(forward, layer, in_half)
        actual = torch.cat([network(batch.half()).float() for batch in images]).numpy()
        cosine, lengths = cosines(expected, actual), np.linalg.norm(actual, axis=1) / np.linalg.norm(expected, axis=1)
        drop = 100 * (evaluate_dataset(dataset, actual).mAP - evaluate_dataset(dataset, expected).mAP)
        print(
            f"sums in float{16 if in_half else 32}: cosine mean {cosine.mean():.7f}, smallest {cosine.min():.7f};"
            f" length {lengths.min():.4f} to {lengths.max():.4f}; mAP {drop:+.3f} points",
            flush=True,
        )


if __name__ == "__main__":
    main()
