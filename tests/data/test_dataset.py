from dataclasses import replace

import numpy as np
import pytest

from pmm_edge.data.checks import FindingKind, analyze
from pmm_edge.data.dataset import DISTRACTOR_PID, data_sha256, problems, queries_with_match, read, scan
from pmm_edge.errors import DataError
from pmm_edge.retrieval import evaluate
from pmm_edge.retrieval.metrics import JUNK_PID

NAMES = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000500_01.jpg", "0007_c1s1_000100_01.jpg"],
    "query": ["0003_c1s1_000200_00.jpg"],
    "bounding_box_test": [
        "-1_c2s1_000001_00.jpg",
        "0000_c1s1_000002_00.jpg",
        "0003_c2s1_000300_00.jpg",
        "._0003_c2s1_000300_00.jpg",
        "Thumbs.db",
    ],
}
QUERY = f"query/{NAMES['query'][0]}"


@pytest.fixture
def market(tmp_path):
    for folder, names in NAMES.items():
        (tmp_path / "mine" / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / "mine" / folder / name).touch()
    return tmp_path / "mine"


def test_names_are_read_as_market1501_writes_them(market):
    dataset = scan(market)
    assert dataset.train.pids.tolist() == [2, 2, 7] and dataset.train.camids.tolist() == [1, 2, 1]
    assert sorted(dataset.gallery.pids.tolist()) == [JUNK_PID, DISTRACTOR_PID, 3] == [-1, 0, 3]
    assert dataset.gallery.identities == 1 and dataset.gallery.cameras == 2
    assert dataset.query.pids.dtype == np.int64
    assert (dataset.name, dataset.layout, problems(dataset)) == ("mine", "market-layout", [])
    one_camera = {name: replace(split, camids=np.ones_like(split.camids)) for name, split in dataset.splits.items()}
    assert len(problems(replace(dataset, **one_camera))) == 1


def test_a_folder_that_cannot_be_read(market):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        read(market / "nowhere")
    for near in (market.parent, market / "bounding_box_train"):
        with pytest.raises(DataError) as error:
            read(near)
        assert error.value.remedy == f"Did you mean {market}?"
    for name in ("anna.jpg", f"{'9' * 30}_c1.jpg"):
        (market / "query" / name).touch()
        with pytest.raises(DataError, match=name):
            read(market)
        (market / "query" / name).unlink()
    (market / QUERY).unlink()
    with pytest.raises(DataError, match="query contains no images"):
        read(market)
    (market / "query").rmdir()
    with pytest.raises(DataError, match="has no folder query"):
        read(market)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bounding_box_train/0007", "bounding_box_train/0002"),  # one training identity
        ("bounding_box_test/0003_c2", "bounding_box_test/0003_c1"),  # matches from the query's camera alone
        ("query/0003", "query/0099"),  # other identities than the gallery
        ("query/0003", "query/-1"),  # junk
        ("query/0003_c1", "query/0003_c2"),  # the camera of its match
    ],
)
def test_splits_that_cannot_be_used_can_still_be_read(market, old, new):
    for path in [path for path in market.rglob("*.jpg") if str(path.relative_to(market)).startswith(old)]:
        path.rename(market / path.relative_to(market).as_posix().replace(old, new))
    dataset = read(market)
    with pytest.raises(DataError) as error:
        scan(market)
    assert len(problems(dataset)) == 1 and str(error.value) == str(problems(dataset)[0])
    unusable = [w for w in analyze(dataset).warnings if w.kind == FindingKind.UNUSABLE]
    assert [w.text for w in unusable] == [str(error.value)]


def test_only_queries_with_a_right_answer_have_a_match(tiny_dataset):
    dataset = read(tiny_dataset)
    assert queries_with_match(dataset).tolist() == list(range(12))
    gallery = dataset.gallery
    alone = replace(
        gallery,
        camids=np.where(gallery.pids == 102, 1, gallery.camids),
        pids=np.where(gallery.pids == 103, JUNK_PID, gallery.pids),
    )
    left = queries_with_match(replace(dataset, gallery=alone))
    assert left.tolist() == [0, 1, 2, 4, 5, 9, 10, 11]
    junk = replace(gallery, pids=np.full(12, JUNK_PID))
    assert not len(queries_with_match(replace(dataset, gallery=junk)))


@pytest.mark.parametrize(("pid", "counted"), [(DISTRACTOR_PID, 1), (JUNK_PID, 0), (3, 1), (4, 0)])
def test_the_finding_about_queries_agrees_with_the_evaluation(market, pid, counted):
    dataset = read(market)
    query = replace(dataset.query, pids=np.array([3, pid]), camids=np.array([1, 3]), paths=2 * dataset.query.paths)
    labels = (query.pids, dataset.gallery.pids, query.camids, dataset.gallery.camids)
    assert evaluate(np.eye(2), np.ones((3, 2)), *labels).valid_queries == 1 + counted
    found = [w for w in analyze(replace(dataset, query=query)).warnings if w.kind == FindingKind.UNMATCHED_QUERIES]
    assert [(w.images, w.pids) for w in found] == [(1, [pid])] * (1 - counted)


def test_the_hash_depends_on_names_and_contents_and_not_on_the_place(market, tmp_path):
    paths = read(market).query.paths
    paths[0].write_bytes(b"one")
    first = data_sha256(paths, market)
    moved = market.rename(tmp_path / "moved")
    assert data_sha256([moved / path.relative_to(market) for path in paths], moved) == first
    (moved / QUERY).write_bytes(b"two")
    assert data_sha256([moved / QUERY], moved) != first
    with pytest.raises(DataError, match="gone"):
        data_sha256([moved / "gone.jpg"], moved)
