"""Which layers INT8 hurts: each is quantised alone, and those that lose most stay in float32 until mAP holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from pmm_edge.data.dataset import ReidDataset, problems
from pmm_edge.errors import CheckFailedError
from pmm_edge.export.options import KEPT_IN_FLOAT
from pmm_edge.progress import Report, silent
from pmm_edge.retrieval import evaluate
from pmm_edge.retrieval.protocol import JUNK_PID
from pmm_edge.runtime import Embedder, embed_files


@dataclass(frozen=True)
class LayerLoss:
    """One layer, and what it means to quantise it."""

    layer: str
    loss: float
    """1 - mean cosine of the embeddings, with this layer alone in INT8."""
    cost: float
    """Its share of the network's multiply-adds, 0..1: what staying in float32 costs."""
    in_float: bool
    """Whether it stays in float32."""


@dataclass(frozen=True, eq=False)
class Held:
    """A network that holds its mAP."""

    network: onnx.ModelProto
    layers: list[LayerLoss]
    """Those that lose most first; empty where all layers could be quantised."""
    outcome: str
    """For the spec."""


def hold_map(
    names: Mapping[str, str],
    costs: Mapping[str, int],
    requantize: Callable[[Collection[str], Collection[str]], onnx.ModelProto],
    loss: Callable[[onnx.ModelProto], float],
    mean_ap: Callable[[onnx.ModelProto], float],
    unreduced: onnx.ModelProto,
    max_drop: float,
    report: Report = silent,
) -> Held:
    """Quantise as many layers as hold the mAP.

    The number of layers in float32 is doubled until mAP holds, then halved in on: about 2 log2 of the number of
    layers evaluations, not one for each layer.

    Args:
        names: of the layers, by node.
        costs: multiply-adds, by node.
        requantize: (nodes that stay in float32, the only nodes to quantise or none for all) -> a network.
        loss: of a network, on the crops that choose.
        mean_ap: of a network, in 0..1.
        unreduced: the network in float32.
        max_drop: in points of 100.

    Raises:
        CheckFailedError: mAP drops by more with every layer in float32 but one.
    """
    base = mean_ap(unreduced)
    tried: dict[int, tuple[onnx.ModelProto, float]] = {}
    order: list[str] = []

    def holds(count: int) -> bool:
        network = requantize(order[:count], ())
        tried[count] = network, 100 * (base - mean_ap(network))
        return tried[count][1] <= max_drop

    losses: dict[str, float] = {}
    least = 0
    if not holds(0):
        for number, node in enumerate(names):
            report("sensitivity", number, len(names), names[node])
            losses[node] = loss(requantize((), (node,)))
        report("sensitivity", len(names), len(names))
        order = sorted(losses, key=lambda node: -losses[node])
        least = _least(holds, len(order) - 1)
    network, drop = tried[least]
    total = sum(costs.values())
    layers = [
        LayerLoss(names[node], losses[node], costs[node] / total, number < least) for number, node in enumerate(order)
    ]
    kept = ", ".join(layer.layer for layer in layers if layer.in_float) or "none"
    change = f"mAP {100 * base:.2f} to {100 * base - drop:.2f}, a drop of {max_drop:g} allowed"
    if not layers:
        change += ", which INT8 throughout holds: no search was needed"
    outcome = f"{change}; {KEPT_IN_FLOAT}{kept}"
    return Held(network, layers, outcome)


def mean_average_precision(embedder: Embedder, dataset: ReidDataset, report: Report = silent) -> float:
    """The mAP, 0..1, on a data set's query and gallery.

    Raises:
        DataError: the splits cannot judge a network, or an image cannot be read.
    """
    for problem in problems(dataset):
        raise problem
    query, gallery, count = dataset.query, dataset.gallery, len(dataset.query)
    kept = np.flatnonzero(gallery.pids != JUNK_PID)  # junk counts for nothing: it is not embedded either
    embeddings = embed_files(embedder, [*query.paths, *(gallery.paths[index] for index in kept)], report=report)
    pids, camids = gallery.pids[kept], gallery.camids[kept]
    return evaluate(embeddings[:count], embeddings[count:], query.pids, pids, query.camids, camids).mAP


def _least(holds: Callable[[int], bool], most: int) -> int:
    """The least number, 1 to `most`, that holds, if more never hold less."""
    failed, number = 0, 1
    while not holds(number):
        if number >= most:
            raise CheckFailedError(
                f"mAP drops by more than allowed even with {number} layers in float32", "Allow a larger --max-map-drop"
            )
        failed, number = number, min(2 * number, most)
    while number - failed > 1:
        middle = (failed + number) // 2
        if holds(middle):
            number = middle
        else:
            failed = middle
    return number
