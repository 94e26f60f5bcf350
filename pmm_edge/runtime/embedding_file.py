"""Embeddings on disk: .npz for NumPy, .parquet for tables. Each carries the spec of the network that made it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pmm_edge.errors import PmmError
from pmm_edge.files import check_output, written_whole
from pmm_edge.runtime.embedder import Embeddings
from pmm_edge.runtime.image_list import Labels
from pmm_edge.spec import METADATA_KEY, ModelSpec

SUFFIXES = (".npz", ".parquet")


def check_embedding_file(path: Path) -> None:
    """Refuse a file that `save_embeddings` could not write, before anything is embedded.

    Raises:
        OutputError: the name ends in none of `SUFFIXES` or is a folder's, or its folder cannot be made or written.
        PmmError: it is a Parquet file and pyarrow is not installed.
    """
    check_output(path, SUFFIXES)
    if _is_parquet(path) and find_spec("pyarrow") is None:
        raise PmmError(
            f"writing {path} needs pyarrow, which is not installed",
            "pip install 'pmm-edge[parquet]', or name a .npz file",
        )


def save_embeddings(
    path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None = None
) -> None:
    """Write embeddings, whole or not at all.

    `.npz`: arrays `embeddings` (N, D) float32, `paths` (N,) text, `spec` the network's spec as JSON text, and of a data
    set `pids`, `camids` (N,) int64 and `split` (N,) text. `numpy.load` opens it without pickle.

    `.parquet`: columns `path`, `embedding` (a list of D float32), and of a data set `pid`, `camid`, `split`; the spec
    is in the schema's metadata under `pmm_edge.spec`.

    Args:
        names: (N,) of the images, as they shall be stored.
        embeddings: (N, D) float32.

    Raises:
        OutputError: the file cannot be written.
        PmmError: it is a Parquet file and pyarrow is not installed.
    """
    check_embedding_file(path)
    write = _write_parquet if _is_parquet(path) else _write_npz
    with written_whole(path) as temporary:
        write(temporary, spec, names, embeddings, labels)


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _write_npz(path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None) -> None:
    arrays = {"embeddings": embeddings, "paths": np.array(names, dtype=np.str_), "spec": np.array(spec.to_json())}
    if labels:
        arrays |= {"pids": labels.pids, "camids": labels.camids, "split": labels.split}
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes any of them for allow_pickle


def _write_parquet(
    path: Path, spec: ModelSpec, names: list[str], embeddings: Embeddings, labels: Labels | None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    size = embeddings.shape[1]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), size)
    columns = {"path": pa.array(names, pa.string()), "embedding": vectors}
    if labels:
        columns |= {"pid": pa.array(labels.pids), "camid": pa.array(labels.camids), "split": pa.array(labels.split)}
    table = pa.table(columns, metadata={METADATA_KEY: spec.to_json()})
    # Floats of an embedding hardly repeat: a dictionary of them costs time and saves nothing.
    pyarrow.parquet.write_table(table, path, use_dictionary=["split"] if labels else False)
