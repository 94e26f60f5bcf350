"""MARS, folders per person and CSV files: labels, cameras, splits and wrong input."""

import base64
import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.data.checks import analyze
from pmm_edge.data.dataset import CSV, FOLDERS, MARS, is_dataset, queries_with_match, read, scan
from pmm_edge.data.people import CameraRule, SplitRule, choose_queries
from pmm_edge.errors import DataError
from pmm_edge.retrieval.metrics import DISTRACTOR_PID, JUNK_PID
from pmm_edge.runtime.embed_files import evaluate_dataset
from pmm_edge.runtime.listing import find_images

WRITTEN_BY_SCIPY = {  # scipy.io.savemat, uncompressed and compressed
    "tracks_test_info.mat": (
        "c-r%I4DoSvQZUssQ1EpO(M`+DNmZaVV1NNePhUPT&A`A0q&OHLGzhRF@mU~B82Ev>q$n{tJH8~fxFkL^FD;*e6DW27Zr}%d2+iRDp#`9{"
        "2$YtA(h5+T!2!E^2^{KS<};x2;o>lN?8mPj-QExO09@!N(E"
    ),
    "query_IDX.mat": (
        "c-r%I4DoSvQZUssQ1EpO(M`+DNmZaVV1NNePhWl@Wemg>a~>xrBor_tnJGMDNXld5NND{e**JsKtC*=UF*7SLb<c8dmJnHP0V5*=p!(Do"
        "EF1t}TOz#"
    ),
}
TRACKS = (  # each a tracklet of two images, at the indices that tracks_test_info.mat gives
    *("0001C1T0001", "0001C1T0001", "0002C2T0001", "0001C1T0002", "0001C2T0001"),
    *("0001C2T0001", "0000C3T0001", "00-1C1T0001"),
)


def touch(root: Path, names: str) -> Path:
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def refused(root: Path, *parts: object, layout: str | None = None) -> None:
    with pytest.raises(DataError) as error:
        scan(root, layout)
    assert all(str(part) in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def kinds(root: Path, layout: str | None = None) -> set[str]:
    return {warning.kind.value for warning in analyze(read(root, layout)).warnings}


def test_a_folder_per_person_with_a_folder_per_camera_is_split_by_identity(tmp_path: Path) -> None:
    people = ("anna", "bert", "carl", "dora", "-1", "0000")
    root = touch(
        tmp_path / "shop", " ".join(f"{name}/{cam}/{n}.jpg" for name in people for cam in "ab" for n in (1, 2))
    )
    dataset = scan(root)
    assert (dataset.name, dataset.layout) == ("shop", FOLDERS)
    reading = dataset.reading
    assert (reading.camera_rule, reading.split_rule) == (CameraRule.SUBFOLDERS, SplitRule.BY_IDENTITY)
    assert reading.people == {1: "anna", 2: "bert", 3: "carl", 4: "dora"} and reading.cameras == {1: "a", 2: "b"}
    order = sorted(people[:4], key=lambda name: hashlib.sha256(name.encode()).digest())
    (first, second), (third, fourth) = (
        sorted(1 + people.index(name) for name in half) for half in (order[:2], order[2:])
    )
    assert dataset.train.pids.tolist() == 4 * [first] + 4 * [second]
    assert dataset.query.pids.tolist() == [third, third, fourth, fourth]
    assert [path.relative_to(root).parts[1:] for path in dataset.query.paths] == 2 * [("a", "1.jpg"), ("b", "1.jpg")]
    assert sorted(dataset.gallery.pids.tolist()) == sorted([-1, 0] * 4 + dataset.query.pids.tolist())
    assert kinds(root) == {"chosen-queries"}
    assert not is_dataset(root) and find_images(root).dataset is None  # as it may be any folder of images
    assert find_images(root, FOLDERS).dataset.train.paths == dataset.train.paths
    more = scan(touch(root, "emil/a/1.jpg"))
    names = [{one.reading.people[pid] for pid in one.train.pids.tolist()} for one in (dataset, more)]
    assert len(names[0] - names[1]) <= 1
    mixed = touch(root, "anna/loose.jpg below.jpg")
    assert read(mixed).reading.camera_rule is CameraRule.NONE and "ignored-files" in kinds(mixed)


@pytest.mark.parametrize(
    ("names", "layout", "rule", "camids"),
    [
        ("c1_7 c2_7", None, CameraRule.FILE_NAMES, [1, 2]),
        ("a_cam-04b x_CAMERA9", None, CameraRule.FILE_NAMES, [4, 9]),
        ("0002_c1s1_000451_03 0002_c01s1_000451_04 0002_c3s1_000451_03", None, CameraRule.FILE_NAMES, [1, 1, 3]),
        ("c1_7 c1_8", None, CameraRule.NONE, [1, 1]),
        ("c1_7 second", None, CameraRule.NONE, [1, 1]),
        ("pic1 pic2", None, CameraRule.NONE, [1, 1]),
        ("door_1 yard_1", "folders:[a-z]+(?=_)", CameraRule.PATTERN, [1, 2]),
        ("c1_k4 c2_k0", "folders:_k([0-9])", CameraRule.PATTERN, [4, 0]),
    ],
)
def test_cameras_in_names(tmp_path: Path, names: str, layout: str | None, rule: CameraRule, camids: list[int]) -> None:
    for split in ("train", "query", "gallery"):
        for pid in (7, 12):
            touch(tmp_path / split / f"{pid:04}", " ".join(f"{name}.jpg" for name in names.split()))
    dataset = read(tmp_path, layout)
    assert (dataset.reading.camera_rule, dataset.reading.split_rule) == (rule, SplitRule.GIVEN)
    assert dataset.train.pids.tolist() == len(camids) * [7] + len(camids) * [12]
    assert dataset.train.camids.tolist() == 2 * camids and dataset.reading.people == {}
    assert dataset.layout == read(tmp_path, dataset.layout).layout == (layout or FOLDERS)


def test_without_cameras_the_evaluation_is_possible_and_the_consequence_said(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/a/1.jpg train/b/1.jpg query/c/1.jpg gallery/c/2.jpg gallery/d/1.jpg val/e/1.jpg")
    dataset = scan(root)
    assert (dataset.query.camids.tolist(), dataset.gallery.camids.tolist()) == ([1], [2, 2])
    assert kinds(root) == {"no-cameras", "ignored-files"} and dataset.ignored == {"folder val": 1}
    assert evaluate_dataset(dataset, np.eye(3)[[0, 0, 1]]).rank(1) == 1
    root = touch(tmp_path / "other", "train/a/1.jpg train/b/1.jpg test/c/1.jpg test/c/2.jpg test/d/1.jpg")
    assert [len(split) for split in scan(root).splits.values()] == [2, 1, 2]
    assert scan(root).reading.split_rule is SplitRule.QUERIES_CHOSEN


def test_without_training_images_a_data_set_can_be_evaluated(tmp_path: Path, table: Path) -> None:
    table.write_text("\n".join([ROWS[0], *ROWS[3:]]))
    given = touch(tmp_path / "given", "query/c/door/1.jpg gallery/c/yard/2.jpg gallery/-1/yard/3.jpg")
    chosen = touch(tmp_path / "chosen", "test/c/door/1.jpg test/c/yard/2.jpg test/-1/yard/3.jpg")
    for root, rule in ((given, SplitRule.GIVEN), (chosen, SplitRule.QUERIES_CHOSEN), (table, SplitRule.GIVEN)):
        dataset = scan(root, training=False)
        assert [len(split) for split in dataset.splits.values()] == [0, 1, 2]
        assert dataset.reading.split_rule is rule and dataset.query.pids[0] == dataset.gallery.pids.max()
        assert "unusable" in kinds(root)
        refused(root, "training set", "0 identities")
        assert len(find_images(root, FOLDERS if root.is_dir() else CSV).paths) == 3


def test_chosen_queries_have_a_match_and_are_as_stated() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        count = random.integers(1, 12)
        pids, camids = random.integers(-1, 4, count), random.integers(0, 3, count)
        for across in (False, True):
            places = camids if across else 0 * camids
            chosen = choose_queries(pids.tolist(), places.tolist(), range(count), across)
            gallery = [row for row in range(count) if row not in chosen]
            for row in chosen:
                assert any(pids[row] == pids[one] and (not across or camids[row] != camids[one]) for one in gallery)
            for pid in range(1, 4):
                own = [row for row in range(count) if pids[row] == pid]
                if len({places[row] for row in own} if across else own) > 1:
                    assert chosen & {*own}
            assert all(pids[row] > 0 for row in chosen)


@pytest.mark.parametrize(
    ("names", "layout", "parts"),
    [
        ("0002/a.jpg 0002/b.jpg", None, ["no images for query"]),  # one identity
        ("train/a/1.jpg other/a/1.jpg", None, ["contains train", "train, query and gallery"]),
        ("bounding_box_train/0002/a.jpg", None, ["bounding_box_train", "train, query and gallery"]),
        ("bounding_box_train/0002/a.jpg", FOLDERS, ["bounding_box_train", "train, query and gallery"]),
        ("a.jpg b.jpg", FOLDERS, ["folder per person"]),
        ("train/a.jpg gallery/a/1.txt query/a/1.txt", FOLDERS, ["put the people into one folder"]),
        ("a.txt", None, ["docs/datasets.md"]),
        ("2024/05/07/a/1.jpg", None, ["2024/05/07/a/1.jpg", "--layout folders"]),
        ("a/1.jpg b/1.jpg", "folders:cam(", ["cam(", "regular expression"]),
        ("a/cam1.jpg b/1.jpg", "folders:cam(.)", ["b/1.jpg", "'cam(.)'"]),
        ("a/1.jpg", "market1501:c", ["unknown layout"]),
        ("a/c1.jpg b/c2.jpg c/c1.jpg", None, ["no images for query"]),  # nobody was seen by two cameras
    ],
)
def test_folders_that_cannot_be_read(tmp_path: Path, names: str, layout: str | None, parts: list[str]) -> None:
    refused(touch(tmp_path, names), *parts, layout=layout)


ROWS = [
    "path,pid,camid,split,note",
    "a/1.jpg,anna,1,train,",
    'a/1b.jpg,bert,2,train,"x, y"',
    "a/2.jpg,-1,1,gallery,",
    " b/3.jpg, carl ,1,query,",
    "b/4.jpg,carl,3,gallery,",
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    touch(tmp_path / "data", "a/1.jpg a/1b.jpg a/2.jpg b/3.jpg b/4.jpg ../out.jpg")
    (tmp_path / "data" / "people.csv").write_text("\n".join(ROWS), "utf-8-sig")
    return tmp_path / "data" / "people.csv"


def test_a_csv_file(table: Path, pmm: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = scan(table)
    assert (dataset.name, dataset.layout, dataset.root) == ("people.csv", CSV, table) and is_dataset(table)
    assert dataset.train.pids.tolist() == [1, 2] and dataset.query.pids.tolist() == [3]
    assert dataset.gallery.pids.tolist() == [JUNK_PID, 3] and dataset.gallery.camids.tolist() == [1, 3]
    assert dataset.reading.people == {1: "anna", 2: "bert", 3: "carl"}
    with table.open("a") as file:
        file.write(f"\n{table.parent.parent / 'out.jpg'},0,2,gallery,\n")
    found = find_images(table)
    assert found.names == ["b/3.jpg", "a/2.jpg", "b/4.jpg", str(table.parent.parent / "out.jpg"), "a/1.jpg", "a/1b.jpg"]
    assert found.dataset.reading.people[1] == "0"  # a person, so that numbers follow the sorted names
    monkeypatch.chdir(table.parent)
    facts = pmm("data", "people.csv", "--json").json
    assert (facts["layout"], facts["camera_rule"], facts["split_rule"]) == ("csv", "camid-column", "given")
    assert "camid-column" in pmm("data", "people.csv").ok.stdout
    table.write_text("\n".join(ROWS).replace("anna", "17").replace("bert", "4").replace("carl", "0009"))
    assert scan(table).train.pids.tolist() == [17, 4] and scan(table).reading.people == {}
    table.with_suffix(".txt").write_text(table.read_text())
    assert scan(table.with_suffix(".txt"), CSV).train.pids.tolist() == [17, 4]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("path,", "file,", ["people.csv has no column path", "path,pid,camid,split"]),
        ("pid,camid", "pid;camid", ["pid, camid"]),
        ("b/4.jpg", "b/5.jpg", ["row 6 of", "b/5.jpg"]),
        ("b/4.jpg", "./b/../b/4.jpg", ["row 6 of", "out of the folder"]),
        ("b/4.jpg", "../out.jpg", ["row 6 of", "../out.jpg"]),
        ("b/4.jpg", "./b//3.jpg", ["row 6 of", "row 5"]),
        ("b/4.jpg", "\0", ["row "]),
        ("b/4.jpg", "", ["row 6 of", "no path"]),
        ("carl,3", ",3", ["row 6 of", "pid"]),
        ("carl,3", "carl,c3", ["row 6 of", "'c3'"]),
        ("carl,3", "carl,-3", ["row 6 of", "'-3'"]),
        ("carl,3", f"carl,{'9' * 30}", ["row 6 of", "999"]),
        ("3,gallery", "3,galery", ["row 6 of", "Did you mean 'gallery'?"]),
        ("3,gallery,", "3", ["row 6 of", "fewer"]),
        ("3,gallery,", "3,gallery,,,", ["row 6 of", "more"]),
        ("b/4.jpg", '"b/4.jpg', ["row "]),
        (",query,", ",train,", ["no images for query"]),
        ("carl ", "dora ", ["no query", "another camera"]),
    ],
)
def test_rows_that_are_wrong(table: Path, old: str, new: str, parts: list[str]) -> None:
    text = table.read_text("utf-8-sig")
    assert text.count(old) == 1
    table.write_text(text.replace(old, new))
    refused(table, *parts)


def test_other_files_are_no_csv_of_labels(table: Path) -> None:
    (table.parent / "list.csv").write_text("a/1.jpg\n")
    assert not is_dataset(table.parent / "list.csv") and find_images(table.parent / "list.csv").source == "list"
    refused(table.parent / "list.csv", "no column path")
    refused(table.parent / "none.csv", "is not a folder")
    refused(table.parent / ("x" * 300), "x" * 300)
    refused(table.parent, "is not a file", layout=CSV)
    os.mkfifo(table.parent / "pipe.csv")
    refused(table.parent / "pipe.csv", "is not a file", layout=CSV)
    table.write_bytes(b"path,pid,camid,split\n\xff\xfe,1,2,train\n")
    refused(table, "row 2 of")


@pytest.fixture
def mars(tmp_path: Path) -> Path:
    names = [f"{track}F{number:03}.jpg" for number, track in enumerate(TRACKS, 1)]
    root = touch(tmp_path / "MARS", " ".join(f"bbox_test/{name[:4]}/{name}" for name in names))
    touch(root / "bbox_train", "0003/0003C1T0001F001.jpg 0003/0003C1T0001F002.jpg 0005/0005C6T0001F001.jpg")
    (root / "info").mkdir()
    (root / "info" / "test_name.txt").write_text("\n".join(names) + "\n")
    for name, packed in WRITTEN_BY_SCIPY.items():
        (root / "info" / name).write_bytes(zlib.decompress(base64.b85decode(packed)))
    return root


def test_mars(mars: Path) -> None:
    dataset = scan(mars)
    assert (dataset.layout, dataset.name, is_dataset(mars)) == (MARS, "MARS", True)
    assert dataset.reading.split_rule is SplitRule.GIVEN and kinds(mars) == set()
    assert [path.name[:11] for path in dataset.query.paths] == ["0001C1T0001", "0001C1T0001", "0001C1T0002"]
    assert dataset.query.tracks[0] == dataset.query.tracks[1] != dataset.query.tracks[2]
    assert dataset.gallery.pids.tolist() == [JUNK_PID, DISTRACTOR_PID, 1, 1, 2]
    assert dataset.train.pids.tolist() == [3, 3, 5] and dataset.train.camids.tolist() == [1, 1, 6]
    assert len({*dataset.train.tracks, *dataset.query.tracks, *dataset.gallery.tracks}) == 8
    touch(mars / "bbox_test", "0000/0000C3T10000F001.jpg")  # pmm synth draws as many with many distractors
    assert (scan(mars).gallery.pids == DISTRACTOR_PID).sum() == 2


@pytest.mark.parametrize("name", ["query_IDX.mat", "tracks_test_info.mat", "test_name.txt"])
def test_mars_without_its_lists_has_chosen_queries(mars: Path, name: str) -> None:
    file = mars / "info" / name
    content, random = file.read_bytes(), np.random.default_rng(0)
    for changed in [b"", content[: len(content) // 2], content[:140], b"\x89HDF" + content[4:], *range(100)]:
        if isinstance(changed, int):
            flipped = bytearray(content)
            flipped[random.integers(len(content))] ^= 1 << random.integers(8)
            changed = bytes(flipped)
        file.write_bytes(changed)
        assert read(mars).reading.split_rule in SplitRule  # and no other error
    file.unlink()
    dataset = scan(mars)
    assert dataset.reading.split_rule is SplitRule.QUERIES_CHOSEN and kinds(mars) == {"chosen-queries"}
    assert [path.name[:11] for path in dataset.query.paths] == ["0001C1T0001"] * 2
    assert len(queries_with_match(dataset)) == 2
    (mars / "bbox_test" / "0001" / "anna.jpg").touch()
    refused(mars, "anna.jpg", "0001C1T0001F001.jpg")
