"""Exported ONNX files in OpenVINO, which shares no code with ONNX Runtime: cosine and mAP on a data set.

    python benchmarks/second_engine.py DATA model.onnx [model-fp16.onnx ...] [--images 400] [--as-written]

The reference is the first file in ONNX Runtime. OpenVINO (in the `dev` extra) rearranges INT8 graphs for its own
kernels; `--as-written` disables that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openvino
from half_sums import subset
from machine import machine

from pmm_edge.console import about, print_line, print_table, progress
from pmm_edge.data.dataset import scan
from pmm_edge.images import Pixels, network_input
from pmm_edge.retrieval.distances import cosines
from pmm_edge.runtime import Embedder, load
from pmm_edge.runtime.embed_files import embed_files, evaluate_dataset
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embeddings


class OpenVinoEmbedder(Embedder):
    """A graph in OpenVINO, with FP32 and FP16 in float32: its default on some processors is bfloat16."""

    def __init__(self, path: Path, as_written: bool) -> None:
        super().__init__(load(path, "cpu").spec, path, "openvino", "cpu")
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"LP_TRANSFORMS_MODE": "OFF"} if as_written else {})
        self._network = openvino.Core().compile_model(path, "CPU", settings)

    def embed_prepared(self, images: Pixels) -> Embeddings:
        embeddings: Embeddings = self._network({INPUT: network_input(images, self.spec.input)})[OUTPUT].copy()
        return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("models", type=Path, nargs="+", help="files of pmm export, the reference first")
    parser.add_argument("--images", type=int, help="use this many images of query and gallery and omit mAP")
    parser.add_argument("--as-written", action="store_true", help="do not let OpenVINO rearrange INT8 graphs")
    arguments = parser.parse_args()

    dataset, first, rows = subset(scan(arguments.data), arguments.images), arguments.models[0], []
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    with progress() as report:
        base = embed_files(load(first, "cpu"), paths, report=report).embeddings
        for path in arguments.models:
            embedder = OpenVinoEmbedder(path, arguments.as_written)
            found = embed_files(embedder, paths, report=about("OpenVINO", report)).embeddings
            cosine, change = cosines(base, found), ""
            if not arguments.images:
                before, after = (evaluate_dataset(dataset, embeddings).mAP for embeddings in (base, found))
                change = f"{100 * (after - before):+.3f}"
            rows.append([path.name, f"{cosine.mean():.7f}", f"{cosine.min():.7f}", change])
    print_line(machine("onnxruntime-gpu", "onnxruntime", "openvino"))
    title = f"closeness to {first.name} in ONNX Runtime on {len(base)} images"
    print_table(title, ["in OpenVINO", "cosine mean", "cosine min", "mAP, points"], rows)


if __name__ == "__main__":
    main()
