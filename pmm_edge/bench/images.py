"""What a bench compares on: the queries and gallery of a data set, or the crops of any folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pmm_edge.data.dataset import ReidDataset, queries_with_match, read
from pmm_edge.errors import DataError, PmmError
from pmm_edge.images import evenly
from pmm_edge.runtime.image_list import find_images, is_dataset


@dataclass(frozen=True, eq=False)
class BenchImages:
    """Image files in the order in which they are embedded."""

    source: Path
    root: Path
    """What the images' names are relative to."""
    paths: list[Path]
    dataset: ReidDataset | None
    """Where retrieval can be judged: the paths are its queries followed by its gallery."""
    why_no_retrieval: str | None
    """One line, where it cannot."""


def bench_images(source: Path, limit: int | None = None, layout: str | None = None) -> BenchImages:
    """Find the images; none is opened.

    Args:
        source: a data set, any other folder of crops (searched with what it holds), or a text file with their paths.
        limit: take this many, spread evenly.
        layout: of the data set, where it is not recognised by itself.

    Raises:
        DataError: nothing is there, a layout is named for a list, or no query of the data set has a match.
        PmmError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PmmError(f"a limit of {limit} leaves no images", "Choose 1 or more, such as --limit 100")
    if not source.exists():
        raise DataError(f"{source} does not exist", "Name a data set or a folder of crops")
    if not source.is_dir() or not (layout or is_dataset(source)):
        paths = find_images(source, layout).paths
        why = f"{source} is no data set with identities: parity without retrieval"
        return BenchImages(source, source if source.is_dir() else source.parent, _spread(paths, limit), None, why)
    dataset = read(source, layout)
    if not len(queries_with_match(dataset)):  # before anything is measured
        raise DataError(
            f"no query of {dataset.root} has a match in its gallery from another camera",
            "Put its images back together, or name one of its folders for parity without retrieval",
        )
    everything = [*dataset.query.paths, *dataset.gallery.paths]
    paths = _spread(everything, limit)
    if len(paths) < len(everything):
        why = f"{len(paths):,} of {len(everything):,} images: retrieval is judged on all of them or not at all"
        return BenchImages(source, dataset.root, paths, None, why)
    return BenchImages(source, dataset.root, paths, dataset, None)


def _spread(paths: Sequence[Path], limit: int | None) -> list[Path]:
    return list(paths) if limit is None else [paths[row] for row in evenly(len(paths), limit)]
