"""Exported ONNX files in OpenVINO, which shares no code with ONNX Runtime: cosine and mAP on a data set.

    python benchmarks/second_engine.py DATA model.onnx [model-fp16.onnx ...] [--images 400] [--as-written]

The first file, run by ONNX Runtime, is the reference. OpenVINO, one of the `dev` extra's packages, rearranges INT8
graphs for its own kernels; `--as-written` switches that off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openvino
from machine import machine
from precision import told

from pmm_edge.bench.parity import compare
from pmm_edge.data.dataset import scan
from pmm_edge.images import Pixels, evenly, network_input
from pmm_edge.runtime import Embedder, embed_files, load
from pmm_edge.runtime.embed_files import EmbeddedDataset
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embeddings


class OpenVinoEmbedder(Embedder):
    """A graph in OpenVINO. Left alone it computes FP32 in bfloat16 on processors that have it, and FP16 as well."""

    def __init__(self, path: Path, as_written: bool) -> None:
        super().__init__(load(path, "cpu").spec, path, "openvino", "cpu")
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"LP_TRANSFORMS_MODE": "OFF"} if as_written else {})
        self._network = openvino.Core().compile_model(path, "CPU", settings)

    def embed_prepared(self, images: Pixels) -> Embeddings:
        embeddings: Embeddings = self._network({INPUT: network_input(images, self.spec.input)})[OUTPUT].copy()
        return embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set's folder")
    parser.add_argument("models", type=Path, nargs="+", help="files of pmm export, the reference first")
    parser.add_argument("--images", type=int, help="at most so many of query and gallery; mAP is then left out")
    parser.add_argument("--as-written", action="store_true", help="let OpenVINO rearrange nothing for INT8")
    arguments = parser.parse_args()

    dataset = scan(arguments.data)
    paths = [*dataset.query.paths, *dataset.gallery.paths]
    whole = arguments.images is None
    if not whole:
        paths = [paths[row] for row in evenly(len(paths), arguments.images)]

    print(machine("onnxruntime-gpu", "onnxruntime", "openvino"))
    base = embed_files(load(arguments.models[0], "cpu"), paths, report=told).embeddings
    base_map = EmbeddedDataset(dataset, base).evaluate().mAP if whole else None
    its_map = f"; its mAP is {100 * base_map:.2f}" if base_map else ""
    print(
        f"closeness to {arguments.models[0].name} in ONNX Runtime on {len(paths)} images of query and gallery{its_map}"
    )
    print(f"{'in OpenVINO':28}  cosine mean    cosine min" + ("    mAP, points" if whole else ""))
    for path in arguments.models:
        embeddings = embed_files(OpenVinoEmbedder(path, arguments.as_written), paths, report=told).embeddings
        closeness = compare(base, embeddings, paths).whole
        line = f"{path.name:28}  {closeness.cosine_mean:11.7f}  {closeness.cosine_min:12.7f}"
        if base_map:
            line += f"  {100 * (EmbeddedDataset(dataset, embeddings).evaluate().mAP - base_map):+12.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
