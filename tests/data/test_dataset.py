from dataclasses import replace

import numpy as np
import pytest

from pmm_edge.data.checks import analyse
from pmm_edge.data.dataset import DISTRACTOR_PID, queries_with_match, read, scan
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
    assert (dataset.name, dataset.layout) == ("mine", "market layout")


def break_it(market, how):
    match how:
        case "missing":
            return market / "nowhere"
        case "no query":
            (market / "query" / NAMES["query"][0]).unlink()
            (market / "query").rmdir()
        case "empty":
            (market / "query" / NAMES["query"][0]).unlink()
        case "name":
            (market / "query" / "anna.jpg").touch()
        case "endless number":
            (market / "query" / f"{'9' * 30}_c1.jpg").touch()
        case "one identity":
            (market / "bounding_box_train" / "0007_c1s1_000100_01.jpg").unlink()
        case "one camera":
            for path in market.glob("*/*_c2*"):
                path.rename(path.with_name(path.name.replace("_c2", "_c1s9")))
        case "others":
            (market / "query" / NAMES["query"][0]).rename(market / "query" / "0099_c1s1_000200_00.jpg")
        case "junk":
            (market / "query" / NAMES["query"][0]).rename(market / "query" / "-1_c1s1_000200_00.jpg")
        case "its own camera":
            (market / "query" / NAMES["query"][0]).rename(market / "query" / "0003_c2s1_000200_00.jpg")
    return market


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "nowhere is no folder. Name the folder that holds bounding_box_train/"),
        ("no query", "has no folder query: it is not in the layout of Market-1501"),
        ("empty", "query holds no images"),
        ("name", "anna.jpg does not say who it shows"),
        ("endless number", "_c1.jpg does not say who it shows"),
        ("one identity", "shows 1 identity"),
        ("one camera", "come from one camera"),
        ("others", "no query of .*mine has a match in its gallery from another camera"),
        ("junk", "no query of .*mine has a match"),
        ("its own camera", "no query of .*mine has a match"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(market, how, message):
    with pytest.raises(DataError, match=message):
        scan(break_it(market, how))


@pytest.mark.parametrize("how", ["one identity", "one camera", "others", "junk"])
def test_what_cannot_train_or_judge_can_still_be_looked_at(market, how):
    assert len(read(break_it(market, how)).query) == 1


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
def test_a_warning_says_of_a_query_what_evaluation_does_with_it(market, pid, counted):
    dataset = read(market)
    query = replace(dataset.query, pids=np.array([3, pid]), camids=np.array([1, 3]), paths=2 * dataset.query.paths)
    labels = (query.pids, dataset.gallery.pids, query.camids, dataset.gallery.camids)
    assert evaluate(np.eye(2), np.ones((3, 2)), *labels).valid_queries == 1 + counted
    warned = [finding.text for finding in analyse(replace(dataset, query=query)).warnings if "queries" in finding.text]
    assert [f"1 of 2 queries, of 1 identity ({pid})" in text for text in warned] == [True] * (1 - counted)


def test_a_folder_one_level_too_high_is_pointed_out(market):
    with pytest.raises(DataError, match=f"Did you mean {market}"):
        scan(market.parent)


def test_a_folder_one_level_too_low_is_pointed_out(market):
    with pytest.raises(DataError, match=f"Did you mean {market}\\?"):
        scan(market / "bounding_box_train")
