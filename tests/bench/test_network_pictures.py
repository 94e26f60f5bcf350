"""Pictures of the reference in the report, depending on what reference and images allow."""

from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench.network_pictures import network_pictures
from pmm_edge.data.dataset import ReidDataset, read


def titles(reference: Path, folder: Path, with_identities: bool = True) -> list[str]:
    dataset: ReidDataset = read(folder)
    images = [*dataset.query.paths, *dataset.gallery.paths]
    embeddings = np.random.default_rng(0).normal(size=(len(images), 8)).astype(np.float32)
    pictures = network_pictures(reference, images, dataset if with_identities else None, embeddings, "cpu")
    assert all(len(np.unique(np.asarray(picture.image))) > 10 for picture in pictures)
    return [picture.title for picture in pictures]


def test_a_checkpoint_and_a_data_set_allow_all_pictures(tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    assert titles(tiny_checkpoint, tiny_dataset) == ["Attention", "Rankings", "Mixing"]


def test_an_export_or_images_without_identities_allow_fewer(
    tiny_checkpoint: Path, tiny_onnx: Path, tiny_dataset: Path
) -> None:
    assert titles(tiny_onnx, tiny_dataset) == ["Rankings"]
    assert titles(tiny_checkpoint, tiny_dataset, with_identities=False) == ["Attention"]


def test_an_interrupt_keeps_the_pictures_drawn_so_far(
    tiny_checkpoint: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pmm_edge.bench.network_pictures.rank", interrupted)
    assert titles(tiny_checkpoint, tiny_dataset) == ["Attention"]
