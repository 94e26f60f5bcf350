"""Small folders, each in the exact layout of a public data set."""

import json
import shutil
from pathlib import Path

import pytest

from pmm_edge.data import layouts
from pmm_edge.data.checks import analyse, unreadable
from pmm_edge.data.dataset import read, scan
from pmm_edge.data.layouts import LAYOUTS, Expected, KnownSet
from pmm_edge.errors import DataError

MARKET = {
    "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000500_01.jpg", "0007_c1s6_028546_01.jpg.jpg"],
    "query": ["0003_c1s1_000200_00.jpg"],
    "bounding_box_test": ["-1_c2s1_000001_00.jpg", "0000_c1s1_000002_00.jpg", "0003_c2s1_000300_00.jpg", "Thumbs.db"],
}
DUKE = {
    "bounding_box_train": ["0001_c2_f0046182.jpg", "0001_c3_f0046302.jpg", "0005_c2_f0046985.jpg"],
    "query": ["0002_c1_f0044158.jpg"],
    "bounding_box_test": ["0002_c2_f0044278.jpg", "7139_c2_f0160815.jpg"],
}
CUHK03 = {
    "bounding_box_train": ["0001_c1_1.png", "0001_c2_6.png", "0004_c1_34.png"],
    "query": ["0003_c1_21.png"],
    "bounding_box_test": ["0003_c2_26.png"],
}
MSMT17 = {
    "list_train.txt": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_003_14_0303noon_0100_1_ex.jpg 1"],
    "list_val.txt": ["0000/0000_045_12_0303morning_0006_2.jpg 0"],
    "list_query.txt": ["0000/0000_002_05_0114noon_1558_1.jpg 0"],
    "list_gallery.txt": ["0000/0000_004_06_0114noon_1600_1.jpg 0", "0002/0002_001_05_0114noon_1700_1.jpg 2"],
}
RELEASE = {
    "train": ["1_001_1_01.png", "1_001_2_06.png", "2_001_1_01.png"],
    "query": ["5_001_1_02.png"],
    "gallery": ["5_001_2_07.png"],
}


def make_market(root, names):
    for folder, files in names.items():
        (root / folder).mkdir(parents=True)
        for name in files:
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


def make_release(root, kind):
    folder = root / f"images_{kind}"
    folder.mkdir(parents=True)
    split = {}
    for number, (name, images) in enumerate(RELEASE.items()):
        for image in images:
            (folder / image).touch()
        split[name] = [[f"/elsewhere/cuhk03/images_{kind}/{image}", number, 0] for image in images]
    (root / f"splits_new_{kind}.json").write_text(json.dumps([{**split, "num_train_pids": 2}]))
    return folder


MAKERS = {
    "market1501": lambda tmp: make_market(tmp / "Market-1501-v15.09.15", MARKET),
    "dukemtmc-reid": lambda tmp: make_market(tmp / "DukeMTMC-reID", DUKE),
    "cuhk03-np-detected": lambda tmp: make_market(tmp / "CUHK03-NP" / "detected", CUHK03),
    "cuhk03-np-labeled": lambda tmp: make_market(tmp / "CUHK03-NP" / "labeled", CUHK03),
    "msmt17-v1": lambda tmp: make_msmt17(tmp / "MSMT17_V1", "train", "test"),
    "msmt17-v2": lambda tmp: make_msmt17(tmp / "MSMT17_V2", "mask_train_v2", "mask_test_v2"),
    "market layout": lambda tmp: make_market(tmp / "warehouse", MARKET),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_recognised_and_can_be_named(tmp_path, layout):
    root = MAKERS[layout](tmp_path)
    dataset = scan(root)
    assert dataset.layout == layout and dataset.root == root
    assert dataset.name == ("warehouse" if layout == "market layout" else layout)
    assert dataset.train.identities == 2 and dataset.query.identities == 1
    assert scan(root, layout).layout == scan(root, layout.replace(" ", "-")).layout == layout


@pytest.mark.parametrize("layout", ["dukemtmc-reid", "cuhk03-np-labeled", "msmt17-v1", "market layout"])
def test_the_folder_that_one_is_in(tmp_path, monkeypatch, layout):
    monkeypatch.chdir(MAKERS[layout](tmp_path))
    dataset = scan(Path())
    assert dataset.layout == layout
    assert dataset.name == ("warehouse" if layout == "market layout" else layout)


def test_dukemtmc_reid_labels(tmp_path):
    dataset = scan(MAKERS["dukemtmc-reid"](tmp_path))
    assert dataset.train.pids.tolist() == [1, 1, 5] and dataset.train.camids.tolist() == [2, 3, 2]
    assert dataset.gallery.identities == 2, "a distractor of this set has a number of its own"


def test_msmt17_zero_is_a_person_and_testing_shows_others_than_training(tmp_path):
    dataset = scan(MAKERS["msmt17-v1"](tmp_path))
    assert dataset.train.pids.tolist() == [1, 1, 2] and dataset.train.camids.tolist() == [1, 12, 14]
    assert dataset.query.pids.tolist() == [3] and dataset.query.camids.tolist() == [5]
    assert dataset.gallery.pids.tolist() == [3, 5] and dataset.gallery.camids.tolist() == [6, 5]
    assert all(path.is_file() for split in dataset.splits.values() for path in split.paths)


def test_msmt17_trains_on_list_val_as_well(tmp_path):
    root = MAKERS["msmt17-v2"](tmp_path)
    assert len(scan(root).train) == 3
    (root / "list_val.txt").unlink()
    with pytest.raises(DataError, match=r"list_val\.txt does not exist"):
        scan(root)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../../secret/0000_000_01_x.jpg 0", "line 2 of .*names '../../secret/0000_000_01_x.jpg', which is no file"),
        ("/etc/0000_000_01_x.jpg 0", "which is no file inside of the data set"),
        ("0000//etc/0000_000_01_x.jpg 0", "which is no file inside"),
        (r"..\secret\0000_000_01_x.jpg 0", "which is no file inside"),
        ("C:/0000_000_01_x.jpg 0", "which is no file inside"),
        ("0000/anna.jpg 0", "line 2 of .*list_query.txt is no image and identity"),
        ("0000/0000_000_01_x.jpg", "is no image and identity"),
        ("0000/0000_000_01_x.jpg -1", "is no image and identity"),
        ("0000/0000_000_01_x.jpg " + "9" * 40, "is no image and identity"),
        ("0000/0000_000_01_gone.jpg 0", "1 of 2 images that .*list_query.txt lists are not there, such as .*gone.jpg"),
        ("0099/0099_000_01_gone.jpg 0", "1 of 2 images"),
        ("\x00\x1b[2J/0000_000_01_x.jpg 0", r"names '\\x00\\x1b"),
    ],
)
def test_a_strangers_list_is_not_trusted(tmp_path, line, message):
    root = MAKERS["msmt17-v1"](tmp_path)
    with (root / "list_query.txt").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message) as error:
        scan(root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "is no text file"), (b"\n", "lists no images")],
)
def test_a_list_without_lines(tmp_path, content, message):
    root = MAKERS["msmt17-v1"](tmp_path)
    (root / "list_gallery.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        scan(root)


def test_msmt17_without_its_lists_says_so(tmp_path):
    root = MAKERS["msmt17-v1"](tmp_path)
    for path in root.glob("*.txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"list_train\.txt does not exist"):
        scan(root)


def test_cuhk03_np_must_say_which_kind(tmp_path):
    detected, labeled = MAKERS["cuhk03-np-detected"](tmp_path), MAKERS["cuhk03-np-labeled"](tmp_path)
    with pytest.raises(DataError, match=f"Name {detected} or {labeled}"):
        scan(tmp_path / "CUHK03-NP")
    with pytest.raises(DataError, match=f"Did you mean {detected} or {labeled}"):
        scan(tmp_path)
    assert scan(tmp_path / "CUHK03-NP", "cuhk03-np-labeled").root == labeled
    shutil.rmtree(labeled)
    with pytest.raises(DataError, match=f"Did you mean {detected}\\?"):
        scan(tmp_path / "CUHK03-NP")


def test_cuhk03_as_converted_from_the_release(tmp_path, monkeypatch):
    detected, labeled = make_release(tmp_path, "detected"), make_release(tmp_path, "labeled")
    dataset = scan(labeled)
    assert dataset.layout == "cuhk03-np-labeled"
    assert dataset.train.identities == 2, "person 1 of camera pair 1 is not person 1 of pair 2"
    assert dataset.train.camids.tolist() == [1, 2, 1] and dataset.query.paths == [labeled / "5_001_1_02.png"]
    assert scan(tmp_path, "cuhk03-np-detected").root == detected
    monkeypatch.chdir(detected)
    assert scan(Path()).layout == "cuhk03-np-detected"
    with pytest.raises(DataError, match=f"Name {detected} or {labeled}"):
        scan(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 10_000,
        "{}",
        "[]",
        '[{"train": [[1]], "query": [], "gallery": []}]',
        '[{"train": [["../1_001_1_01.txt"]], "query": [["1_001_1_01.png"]], "gallery": [["1_001_1_01.png"]]}]',
        '[{"train": [], "query": [], "gallery": []}]',
        '[{"train": [["1_001_1_99.png"]], "query": [["1_001_1_01.png"]], "gallery": [["1_001_1_01.png"]]}]',
    ],
)
def test_a_split_of_another_form_is_refused(tmp_path, content):
    root = make_release(tmp_path, "detected")
    (tmp_path / "splits_new_detected.json").write_text(content)
    with pytest.raises(DataError, match=r"splits_new_detected\.json"):
        scan(root)


def test_matlab_files_say_how_to_convert(tmp_path):
    (tmp_path / "cuhk03_release").mkdir()
    (tmp_path / "cuhk03_new_protocol_config_detected.mat").touch()
    with pytest.raises(DataError, match=r"as MATLAB files, which are not read\. Take the images of CUHK03-NP"):
        scan(tmp_path)
    (tmp_path / "images_detected").mkdir()
    with pytest.raises(DataError, match="as MATLAB files"):
        scan(tmp_path / "images_detected")


def test_a_wrong_name_of_a_layout(tmp_path):
    root = MAKERS["dukemtmc-reid"](tmp_path)
    with pytest.raises(DataError, match=r"there is no layout dukemtmc\. Did you mean 'dukemtmc-reid'"):
        scan(root, "dukemtmc")
    with pytest.raises(DataError, match="in the layout of dukemtmc-reid, not of msmt17-v1"):
        scan(root, "msmt17-v1")
    msmt17 = MAKERS["msmt17-v2"](tmp_path)
    with pytest.raises(DataError, match="in the layout of msmt17-v2, not of msmt17-v1"):
        scan(msmt17, "msmt17-v1")


@pytest.mark.parametrize("inner", ["test", "train/0000"])
def test_msmt17_one_or_two_levels_too_low(tmp_path, inner):
    root = MAKERS["msmt17-v1"](tmp_path)
    with pytest.raises(DataError, match=f"Did you mean {root}\\?"):
        scan(root / inner)


def test_a_set_of_the_known_size_is_recognised_under_any_name(tmp_path, monkeypatch):
    root = make_market(tmp_path / "occluded", DUKE)
    assert scan(root).layout == "market layout"
    expected = KnownSet("Duke", Expected(2, 3), Expected(1, 1), Expected(2, 2), "")
    monkeypatch.setitem(layouts.KNOWN_SETS, "dukemtmc-reid", expected)
    assert scan(root).layout == "dukemtmc-reid"


def kinds(dataset):
    return [finding.kind for finding in analyse(dataset).warnings]


def texts(dataset):
    return "\n".join(finding.text for finding in analyse(dataset).warnings)


def test_junk_and_distractors_are_counted_apart(tmp_path):
    counts = analyse(read(MAKERS["market layout"](tmp_path))).splits["gallery"]
    assert (counts.identities, counts.images, counts.distractors, counts.junk, counts.cameras) == (1, 2, 1, 1, 2)


def test_counts_of_a_known_set_that_differ_are_both_named(tmp_path):
    dataset = read(MAKERS["market1501"](tmp_path))
    assert kinds(dataset)[:3] == ["counts"] * 3
    assert "gallery shows 1 identity in 2 images; Market-1501 has 750 identities in 15,913 images" in texts(dataset)


def test_people_numbered_from_zero_lose_one_and_are_told(tmp_path):
    people = [f"000{pid}_c{camera}.jpg" for pid in range(3) for camera in (1, 2)]
    root = make_market(tmp_path / "mine", {**MARKET, "bounding_box_train": people})
    assert kinds(read(root)) == ["nobody-in-train"]
    found = texts(read(root))
    assert "train: 2 images numbered 0 left out of training" in found and "a free number above 0" in found
    (root / "bounding_box_train" / "-1_c1.jpg").touch()
    assert "train: 2 images numbered 0 and 1 image numbered -1 left out" in texts(read(root))


def test_people_seen_by_one_camera_only(tmp_path):
    found = texts(read(MAKERS["market layout"](tmp_path)))
    assert "train: 1 of 2 identities seen by one camera only (7)" in found


def test_people_whom_the_set_itself_puts_there_are_no_warning(tmp_path, monkeypatch):
    names = {**DUKE, "bounding_box_train": [*DUKE["bounding_box_train"], "0005_c6_f0047105.jpg"]}
    root = make_market(tmp_path / "DukeMTMC-reID", names)
    assert kinds(read(root, "market-layout")) == ["one-camera"]
    whole = KnownSet("Duke", Expected(2, 4), Expected(1, 1), Expected(2, 2), "", one_camera=1)
    monkeypatch.setitem(layouts.KNOWN_SETS, "dukemtmc-reid", whole)
    assert kinds(read(root)) == []


def test_queries_that_nothing_can_match(tmp_path):
    root = MAKERS["market layout"](tmp_path)
    (root / "query" / "0003_c2s1_000201_00.jpg").touch()
    (root / "query" / "0044_c2s1_000201_00.jpg").touch()
    found = texts(read(root))
    assert "2 of 3 queries, of 2 identities (3, 44), without a gallery image from another camera" in found


def test_people_in_training_and_in_test(tmp_path):
    root = MAKERS["market layout"](tmp_path)
    (root / "bounding_box_test" / "0007_c2s1_000201_00.jpg").touch()
    assert "1 identity of the training set also in query or gallery (7)" in texts(read(root))


def test_query_and_gallery_of_different_people_are_a_warning(tmp_path):
    root = MAKERS["market layout"](tmp_path)
    (root / "query" / "0003_c1s1_000200_00.jpg").rename(root / "query" / "0099_c1s1_000200_00.jpg")
    assert kinds(read(root))[0] == "unusable"
    assert "no query of" in texts(read(root))


def test_unreadable_files_are_found(tiny_dataset, tmp_path):
    good = sorted((tiny_dataset / "query").iterdir())
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good[0].read_bytes()[:400])
    (tmp_path / "empty.jpg").touch()
    seen = []
    bad = unreadable([*good, cut, tmp_path / "empty.jpg"], report=lambda *progress: seen.append(progress))
    assert [image.path.name for image in bad] == ["cut.jpg", "empty.jpg"]
    assert seen[-1][:3] == ("images", 14, 14)
