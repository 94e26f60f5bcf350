"""Layouts, splits and findings of small folders, each in the exact layout of a public data set."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.data import dataset as datasets
from pmm_edge.data.checks import DatasetWarningKind, analyze, unreadable
from pmm_edge.data.dataset import ANY_MARKET, problems, queries_with_match, read, scan
from pmm_edge.errors import DataError
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID
from pmm_edge.runtime.embed_files import evaluate_dataset

MARKET = (
    "0002_c1s1_000451_03.jpg 0002_c2s1_000500_01.jpg 0007_c1s6_028546_01.jpg.jpg",
    "0003_c1s1_000200_00.jpg",
    "-1_c2s1_000001_00.jpg 0000_c1s1_000002_00.jpg 0003_c2s1_000300_00.jpg ._0003_c2s1_000300_00.jpg Thumbs.db",
)
DUKE = (
    "0001_c2_f0046182.jpg 0001_c3_f0046302.jpg 0005_c2_f0046985.jpg",
    "0002_c1_f0044158.jpg",
    "0002_c2_f0044278.jpg 7139_c2_f0160815.jpg",
)
CUHK03 = ("0001_c1_1.png 0001_c2_6.png 0004_c1_34.png", "0003_c1_21.png", "0003_c2_26.png")
MSMT17 = {
    "list_train.txt": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_003_14_0303noon_0100_1_ex.jpg 1"],
    "list_val.txt": ["0000/0000_045_12_0303morning_0006_2.jpg 0"],
    "list_query.txt": ["0000/0000_002_05_0114noon_1558_1.jpg 0"],
    "list_gallery.txt": ["0000/0000_004_06_0114noon_1600_1.jpg 0", "0002/0002_001_05_0114noon_1700_1.jpg 2"],
}


def make_market(root, names):
    for folder, files in zip(("bounding_box_train", "query", "bounding_box_test"), names, strict=True):
        (root / folder).mkdir(parents=True)
        for name in files.split():
            (root / folder / name).touch()
    return root


def make_msmt17(root, train, test):
    for name, lines in MSMT17.items():
        folder = root / (train if name in ("list_train.txt", "list_val.txt") else test)
        for line in lines:
            image = folder / line.split()[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.touch()
        (root / name).write_text("\n".join(lines) + "\n")
    return root


MAKERS = {
    "market1501": lambda tmp: make_market(tmp / "Market-1501-v15.09.15", MARKET),
    "dukemtmc-reid": lambda tmp: make_market(tmp / "DukeMTMC-reID", DUKE),
    "occluded-duke": lambda tmp: make_market(tmp / "Occluded_Duke", DUKE),
    "cuhk03-np-detected": lambda tmp: make_market(tmp / "CUHK03-NP" / "detected", CUHK03),
    "cuhk03-np-labeled": lambda tmp: make_market(tmp / "CUHK03-NP" / "labeled", CUHK03),
    "msmt17-v1": lambda tmp: make_msmt17(tmp / "MSMT17_V1", "train", "test"),
    "msmt17-v2": lambda tmp: make_msmt17(tmp / "MSMT17_V2", "mask_train_v2", "mask_test_v2"),
    ANY_MARKET: lambda tmp: make_market(tmp / "warehouse", MARKET),
}


def refused(root, *parts, layout=None):
    """The data set is refused with one line that contains `parts`."""
    with pytest.raises(DataError) as error:
        scan(root, layout)
    assert all(str(part) in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("layout", MAKERS)
def test_each_layout_is_recognized_and_can_be_named(tmp_path, monkeypatch, layout):
    root = MAKERS[layout](tmp_path)
    dataset = scan(root)
    assert dataset.layout == scan(root, layout).layout == layout and dataset.root == root
    assert dataset.name == root.name  # it has not the size of the known set
    assert dataset.train.identities == 2 and dataset.query.identities == 1
    assert datasets.is_dataset(root) and datasets.is_dataset(root.parent) == (root.parent.name == "CUHK03-NP")
    monkeypatch.chdir(root)
    here = scan(Path())
    assert (here.name, here.layout) == (dataset.name, layout)


def test_labels_of_each_form(tmp_path):
    market = scan(MAKERS[ANY_MARKET](tmp_path))
    assert market.train.pids.tolist() == [2, 2, 7] and market.train.camids.tolist() == [1, 2, 1]
    assert market.gallery.pids.tolist() == [JUNK_PID, DISTRACTOR_PID, 3] and market.gallery.identities == 1
    duke = scan(MAKERS["dukemtmc-reid"](tmp_path))
    assert duke.train.pids.tolist() == [1, 1, 5] and duke.train.camids.tolist() == [2, 3, 2]
    assert duke.gallery.identities == 2  # its distractors have identities of their own
    msmt17 = scan(MAKERS["msmt17-v1"](tmp_path))  # 0 is a person there, and test identities start at 0 again
    assert msmt17.train.pids.tolist() == [1, 1, 2] and msmt17.train.camids.tolist() == [1, 12, 14]
    assert msmt17.query.pids.tolist() == [3] and msmt17.query.camids.tolist() == [5]
    assert msmt17.gallery.pids.tolist() == [3, 5] and msmt17.gallery.camids.tolist() == [6, 5]
    assert all(path.is_file() for split in msmt17.splits.values() for path in split.paths)


LINES = (
    *("../../secret/0000_000_01_x.jpg 0", "/etc/0000_000_01_x.jpg 0", "0000//etc/0000_000_01_x.jpg 0"),
    *(r"..\secret\0000_000_01_x.jpg 0", "C:/0000_000_01_x.jpg 0", "\x00\x1b[2J/0000_000_01_x.jpg 0"),
    *("0000/anna.jpg 0", "0000/0000_000_01_x.jpg", "0000/0000_000_01_x.jpg -1", "a/" * 5000),
    f"0000/0000_000_01_x.jpg {'9' * 40}",
)


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_a_list_that_is_not_an_image_and_an_identity_is_refused(tmp_path, line):
    root = MAKERS["msmt17-v1"](tmp_path)
    with (root / "list_query.txt").open("a") as file:
        file.write(line)
    refused(root, "line 2 of", "list_query.txt", repr(line[:80]))


def test_lists_of_msmt17_must_be_complete(tmp_path):
    root = MAKERS["msmt17-v1"](tmp_path)
    (root / "list_query.txt").write_text("0099/0099_000_01_gone.jpg 0\n")
    refused(root, root / "test" / "0099/0099_000_01_gone.jpg")
    for content in (b"\xff\xfe\x00", b"\n", b""):
        (root / "list_query.txt").write_bytes(content)
        refused(root, root / "list_query.txt")
    for path in (root / "list_val.txt", root / "list_train.txt"):
        path.unlink()
        refused(root, path)


def test_cuhk03_np_must_say_which_kind(tmp_path):
    detected, labeled = MAKERS["cuhk03-np-detected"](tmp_path), MAKERS["cuhk03-np-labeled"](tmp_path)
    refused(tmp_path / "CUHK03-NP", f"Pass {detected} or {labeled}")
    assert scan(tmp_path / "CUHK03-NP", "cuhk03-np-labeled").root == labeled
    shutil.rmtree(labeled)
    refused(tmp_path / "CUHK03-NP", f"Did you mean {detected}?")


def test_cuhk03_as_torchreid_converts_it(tmp_path):
    pixels, root = tmp_path / "elsewhere", tmp_path / "cuhk03/images_detected"
    pixels.mkdir()
    root.parent.mkdir()
    root.symlink_to(pixels)
    lists = {"train": ["1_001_1_01.png", "1_002_2_06.png"], "query": ["2_003_1_01.png"], "gallery": ["2_003_2_06.png"]}
    for name in [name for names in lists.values() for name in names]:
        (pixels / name).touch()
    text = json.dumps([{split: [[f"C:\\data\\{name}", 0, 0] for name in names] for split, names in lists.items()}])
    assert not datasets.is_dataset(root)
    (lists_file := tmp_path / "cuhk03/splits_new_detected.json").write_text(text)
    refused(root.parent, f"Did you mean {root}?")
    for folder, layout in ((root, None), (root.parent, "cuhk03-np-detected")):
        dataset = scan(folder, layout)
        assert (dataset.root, dataset.layout) == (root, "cuhk03-np-detected")
        assert dataset.train.pids.tolist() == [10_001, 10_002] and dataset.query.pids.tolist() == [20_003]
        assert dataset.gallery.camids.tolist() == [2] and dataset.train.paths[0] == root / "1_001_1_01.png"
    refused(root, "bounding_box_train", "--layout", layout="cuhk03-np-labeled")
    (pixels / "2_003_1_01.png").unlink()
    refused(root, f"{lists_file} lists {root / '2_003_1_01.png'}, which does not exist")
    lists_file.write_text("[{}]")
    refused(root, f"{lists_file} does not list the images")


def test_a_wrong_layout_or_folder_is_refused(tmp_path):
    duke, msmt17 = MAKERS["dukemtmc-reid"](tmp_path), MAKERS["msmt17-v1"](tmp_path)
    refused(duke, "unknown layout dukemtmc", "Did you mean 'dukemtmc-reid'?", layout="dukemtmc")
    refused(duke, duke / "list_train.txt", layout="msmt17-v1")
    refused(msmt17, msmt17 / "mask_train_v2", layout="msmt17-v2")
    refused(msmt17, msmt17 / "bounding_box_train", layout="market1501")
    refused(msmt17 / "test", f"Did you mean {msmt17}?")


def test_a_known_set_is_recognized_by_its_size_and_compared_with_it(tmp_path, monkeypatch):
    root = make_market(tmp_path / "occluded", DUKE)
    assert scan(root).layout == ANY_MARKET
    sizes = {"train": datasets.SplitSize(2, 3), "query": datasets.SplitSize(1, 1), "gallery": datasets.SplitSize(2, 2)}
    monkeypatch.setitem(datasets.KNOWN_SETS, "dukemtmc-reid", sizes)
    assert scan(root).layout == scan(root).name == "dukemtmc-reid" and analyze(scan(root)).warnings == []
    (root / "query" / "0002_c3_f0044158.jpg").touch()
    (different,) = analyze(scan(root)).warnings
    assert (different.kind, different.split, different.images) == (DatasetWarningKind.UNEXPECTED_SIZE, "query", 2)
    assert scan(root).name == "occluded"


def test_stray_files_and_names_do_not_change_the_layout(tmp_path):
    root = make_market(tmp_path / "MSMT17", MARKET)
    (root / "list_train.txt").write_text(MSMT17["list_train.txt"][0])
    assert scan(root).layout == scan(root, ANY_MARKET).layout == ANY_MARKET
    assert scan(root, "dukemtmc-reid").layout == "dukemtmc-reid"
    for name in ("images_detected", "train", "list_train.txt"):
        (tmp_path / "crops" / name).mkdir(parents=True)
    assert not datasets.is_dataset(tmp_path / "crops") and not datasets.is_dataset(tmp_path / "crops/images_detected")


@pytest.mark.parametrize(
    ("added", "found"),
    [
        (["bounding_box_train/0000_c1.jpg", "bounding_box_train/0000_c2.jpg"], ("untrained-images", "train", [0], 2)),
        (["bounding_box_train/-1_c1.jpg"], ("untrained-images", "train", [-1], 1)),
        (["query/0000_c1.jpg", "query/0000_c2.jpg"], ("uncounted-queries", "query", [0], 2)),
        (["query/-1_c1.jpg"], ("uncounted-queries", "query", [-1], 1)),
        (["query/0003_c2_1.jpg", "query/0044_c2.jpg"], ("unmatched-queries", "query", [3, 44], 2)),
        (["bounding_box_test/0007_c1.jpg", "bounding_box_test/0007_c2.jpg"], ("train-test-overlap", "", [7], 0)),
    ],
)
def test_counts_and_what_is_wrong_with_the_labels(tmp_path, added, found):
    root = MAKERS[ANY_MARKET](tmp_path)
    counts = analyze(read(root)).splits["gallery"]
    assert (counts.identities, counts.images, counts.distractors, counts.junk, counts.cameras) == (1, 2, 1, 1, 2)
    for name in added:
        (root / name).touch()
    assert found in [(w.kind, w.split, w.pids, w.images) for w in analyze(read(root)).warnings]


def test_unreadable_files_are_found(tiny_dataset, tmp_path):
    good, cut, empty = sorted((tiny_dataset / "query").iterdir()), tmp_path / "cut.jpg", tmp_path / "empty.jpg"
    cut.write_bytes(good[0].read_bytes()[:400])
    empty.touch()
    assert [image.path for image in unreadable([*good, cut, empty])] == [cut, empty]


@pytest.fixture
def market(tmp_path):
    return MAKERS[ANY_MARKET](tmp_path)


def test_a_folder_that_cannot_be_read(market):
    refused(market / "nowhere", "nowhere is not a folder")
    for near in (market.parent, market / "bounding_box_train"):
        refused(near, f"Did you mean {market}?")
    for name in ("anna.jpg", f"{'9' * 30}_c1.jpg"):
        (market / "query" / name).touch()
        refused(market, name)
        (market / "query" / name).unlink()
    next((market / "query").iterdir()).unlink()
    refused(market, market / "query")


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
    unusable = [w for w in analyze(dataset).warnings if w.kind == DatasetWarningKind.UNUSABLE]
    assert [w.text for w in unusable] == [str(error.value)]


def test_combined_data_sets_keep_people_and_cameras_apart(tmp_path):
    made = [(ANY_MARKET, "duke"), ("dukemtmc-reid", "d"), ("msmt17-v1", "m")]
    sets = [read(MAKERS[layout](tmp_path / name)) for layout, name in made]
    (sets[1].root / "bounding_box_train" / "0000_c1_f0000001.jpg").touch()
    sets[1] = read(sets[1].root)
    whole = datasets.combine(sets)
    assert whole.query is sets[0].query and whole.gallery is sets[0].gallery
    assert whole.train.paths == [path for one in sets for path in one.train.paths]
    assert whole.train.pids.tolist() == [2, 2, 7, 0, 8, 8, 12, 13, 13, 14]
    assert whole.train.identities == sum(one.train.identities for one in sets)
    first, second, third = np.split(whole.train.camids, [3, 7])
    assert max(*first, 2) < min(second) and max(second) < min(third) and first.tolist() == [1, 2, 1]
    assert len({one.fingerprint() for one in (*sets, whole)}) == 4 and datasets.combine(sets[:1]) is sets[0]
    empty = replace(sets[1], train=sets[1].train.select([0]))
    for wrong in ([sets[0], empty], [sets[0], sets[1], sets[0]]):
        with pytest.raises(DataError, match=str(wrong[-1].root)):
            datasets.combine(wrong)


@pytest.mark.parametrize(("pid", "counted"), [(DISTRACTOR_PID, 0), (JUNK_PID, 0), (3, 1), (4, 0)])
def test_the_finding_about_queries_agrees_with_the_evaluation(market, pid, counted):
    dataset = read(market)
    query = replace(dataset.query, pids=np.array([3, pid]), camids=np.array([1, 3]), paths=2 * dataset.query.paths)
    dataset = replace(dataset, query=query)
    assert evaluate_dataset(dataset, np.eye(5)).valid_queries == 1 + counted
    assert queries_with_match(dataset).tolist() == [0, 1][: 1 + counted]
    found = [(w.images, w.pids) for w in analyze(dataset).warnings if w.split == "query"]
    assert found == [(1, [pid])] * (1 - counted)


def test_the_hash_depends_on_names_and_contents_and_not_on_the_place(market, tmp_path):
    (path,) = read(market).query.paths
    path.write_bytes(b"one")
    first, moved = datasets.data_sha256([path], market), market.rename(tmp_path / "moved")
    path = moved / path.relative_to(market)
    assert datasets.data_sha256([path], moved) == first
    path.write_bytes(b"two")
    assert datasets.data_sha256([path], moved) != first
    with pytest.raises(DataError, match="gone"):
        datasets.data_sha256([moved / "gone.jpg"], moved)
