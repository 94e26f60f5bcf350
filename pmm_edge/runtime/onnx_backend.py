"""Exported networks in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pmm_edge.errors import ModelError
from pmm_edge.runtime.build_settings import BatchProfile
from pmm_edge.runtime.crops import Pixels, network_input
from pmm_edge.runtime.embedder import INPUT, OUTPUT, Embedder, Embeddings
from pmm_edge.runtime.onnx_session import TENSORRT, open_session
from pmm_edge.spec import METADATA_KEY, ModelSpec


class OnnxEmbedder(Embedder):
    """An ONNX file of `pmm export`, run by ONNX Runtime.

    Args:
        path: the file.
        device: `cpu`, `cuda`, `cuda:N`, `tensorrt` or `tensorrt:N`; None takes a GPU where ONNX Runtime can use one,
            with its CUDA provider, and warns where there is one that it cannot use.
        content: the file's bytes, where they were read already.

    Raises:
        ModelError: the file is missing, truncated or not ours, or the device cannot be used.
    """

    def __init__(self, path: Path, device: str | None = None, content: bytes | None = None) -> None:
        if not path.is_file():
            raise ModelError(f"{path} does not exist", "Make it with pmm export")
        self._session, used, self.profile = open_session(path, content, device)
        backend = "onnxruntime-tensorrt" if self._session.get_providers()[0] == TENSORRT else "onnxruntime"
        super().__init__(_spec(self._session, path), path, backend, used)
        batch = self._session.get_inputs()[0].shape[0]
        if isinstance(batch, int):
            self.profile = BatchProfile(batch, batch, batch)
        # Asked of the session, as a device is: what was really set.
        self.threads = self._session.get_session_options().intra_op_num_threads or None

    @property
    def loads_with(self) -> str:
        return self.device.replace("cuda", "tensorrt") if self.backend == "onnxruntime-tensorrt" else self.device

    def embed_prepared(self, images: Pixels) -> Embeddings:
        return self._embed(network_input(images, self.spec.input))

    def embed_normalized(self, images: NDArray[np.float32]) -> Embeddings | None:
        size = self.spec.input
        if size.form == "uint8":
            return None
        if size.form == "raw":
            mean, std = (np.array(values, np.float32)[:, None, None] for values in (size.mean, size.std))
            images = (images * std + mean) * np.float32(255)
        return self._embed(images)

    def _embed(self, fed: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        if self.profile is None:
            return self._run(fed)
        count, size = len(fed), self.profile.maximum
        missing = self.profile.minimum - (count % size or size)  # in the last batch
        if missing > 0:
            fed = np.concatenate([fed, np.zeros_like(fed, shape=(missing, *fed.shape[1:]))])
        return np.concatenate([self._run(fed[start : start + size]) for start in range(0, len(fed), size)])[:count]

    def _run(self, fed: NDArray[np.uint8] | NDArray[np.float32]) -> Embeddings:
        try:
            (embeddings,) = self._session.run([OUTPUT], {INPUT: fed})
        # Its exceptions have nothing in common but this.
        except Exception as error:
            raise ModelError(
                f"onnxruntime cannot run {self.path} at batch {len(fed)} ({str(error).splitlines()[0]})",
                "Try a smaller batch where memory is short; else export it again with pmm export",
            ) from error
        return np.asarray(embeddings, dtype=np.float32)


def _spec(session: onnxruntime.InferenceSession, path: Path) -> ModelSpec:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise ModelError(
            f"{path} carries no pmm-edge spec: it was not made by pmm export, or a tool dropped its metadata",
            "Export it again with pmm export",
        )
    spec = ModelSpec.from_json(text, str(path))
    inputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_inputs()}
    expected = {INPUT: spec.input.shape(1)[1:]}
    outputs = {tensor.name: tuple(tensor.shape[1:]) for tensor in session.get_outputs()}
    if inputs != expected or outputs != {OUTPUT: (spec.embedding_size,)}:
        raise ModelError(
            f"the graph in {path} is not what its spec says: {inputs} gives {outputs}",
            "A tool changed it; export it again with pmm export",
        )
    return spec
