"""Pictures of the reference in the report: what each kind of reference and of images allows."""

from pathlib import Path

import numpy as np

from pmm_edge.bench import Options, network_pictures
from pmm_edge.bench.network_pictures import network_pictures as pictures_of
from pmm_edge.bench.pipeline import bench_run


def titles(reference: Path, data: Path) -> list[str]:
    run = bench_run([reference], reference, data, Options(speed=False))
    return [picture.title for picture in pictures_of(run)]


def test_a_checkpoint_on_its_data_set_has_all_pictures(tiny_checkpoint: Path, tiny_dataset: Path) -> None:
    run = bench_run([tiny_checkpoint], tiny_checkpoint, tiny_dataset, Options(speed=False))
    pictures = pictures_of(run)
    assert [picture.title for picture in pictures] == ["Attention", "Rankings", "Mixing"]
    assert all(len(np.unique(np.asarray(picture.image))) > 10 for picture in pictures)


def test_an_export_shows_what_it_retrieves(tiny_onnx: Path, tiny_dataset: Path) -> None:
    assert titles(tiny_onnx, tiny_dataset) == ["Rankings"]


def test_crops_without_identities_show_attention(tiny_checkpoint: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    crops = tmp_path / "crops"
    crops.mkdir()
    for number, image in enumerate(sorted((tiny_dataset / "query").glob("*.jpg"))[:4]):
        (crops / f"{number}.jpg").write_bytes(image.read_bytes())
    assert titles(tiny_checkpoint, crops) == ["Attention"]


def test_an_interrupt_keeps_what_is_drawn(tiny_checkpoint: Path, tiny_dataset: Path, monkeypatch) -> None:
    run = bench_run([tiny_checkpoint], tiny_checkpoint, tiny_dataset, Options(speed=False))

    def interrupted(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(network_pictures, "_rankings", interrupted)
    assert [picture.title for picture in pictures_of(run)] == ["Attention"]
