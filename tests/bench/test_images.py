"""A bench runs on a data set or on any folder; what cannot judge retrieval is said before anything is measured."""

import shutil
from pathlib import Path

import pytest

from pmm_edge.bench.pipeline import bench_images
from pmm_edge.errors import DataError, PmmError


def test_a_data_set_gives_its_queries_and_gallery(tiny_dataset: Path) -> None:
    images = bench_images(tiny_dataset)
    assert images.dataset is not None
    assert images.paths == [*images.dataset.query.paths, *images.dataset.gallery.paths]
    assert images.why_no_retrieval is None


def test_any_folder_gives_its_crops_without_retrieval(tiny_dataset: Path) -> None:
    images = bench_images(tiny_dataset / "query")
    assert len(images.paths) == 12
    assert images.dataset is None
    assert "no data set with identities" in str(images.why_no_retrieval)


def test_a_limit_spreads_over_all_and_leaves_retrieval_out(tiny_dataset: Path) -> None:
    everything, images = bench_images(tiny_dataset).paths, bench_images(tiny_dataset, limit=6)
    assert images.paths == everything[::4]
    assert images.dataset is None
    assert "6 of 24 images" in str(images.why_no_retrieval)
    assert bench_images(tiny_dataset, limit=24).dataset is not None


def test_no_query_with_a_match_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_dataset, tmp_path / "data")
    for path in [*(root / "bounding_box_test").iterdir(), *(root / "query").iterdir()]:
        if "_c1" not in path.name:
            path.unlink()
    with pytest.raises(DataError, match=r"no query of .* has a match in its gallery from another camera"):
        bench_images(root)


def test_query_and_gallery_that_share_junk_alone_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tiny_dataset, tmp_path / "data")
    for path in (root / "query").iterdir():
        path.rename(path.with_name(f"-1{path.name[4:]}"))
    shutil.copytree(root / "query", root / "bounding_box_test", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"no query of .* has a match in its gallery from another camera"):
        bench_images(root)


def test_a_layout_of_a_list_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    lines = tmp_path / "list.txt"
    lines.write_text("\n".join(str(path) for path in (tiny_dataset / "query").iterdir()))
    assert len(bench_images(lines).paths) == 12
    with pytest.raises(DataError, match=r"list\.txt is no folder, so it is in no layout\. Leave --layout out"):
        bench_images(lines, layout="market1501")


def test_nothing_to_compare_on(tmp_path: Path, tiny_dataset: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        bench_images(tmp_path / "none")
    with pytest.raises(DataError, match="names no images"):
        bench_images(tmp_path)
    with pytest.raises(PmmError, match="a limit of 0 leaves no images"):
        bench_images(tiny_dataset, limit=0)
