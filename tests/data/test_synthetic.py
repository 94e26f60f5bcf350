from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.synthetic import (
    SyntheticConfig,
    cached_synthetic,
    contact_sheet,
    count_images,
    generate,
    make_synthetic,
)
from pmm_edge.data.synthetic.person import MAX_GROUP, make_person
from pmm_edge.errors import OutputError, PmmError

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c([1-9])s([1-6])_(\d{6})_(\d{2})\.jpg")
SMALL = SyntheticConfig(train_identities=6, test_identities=4, cameras=4, images=2, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_synthetic(tmp_path_factory.mktemp("data") / "synthetic", SMALL, workers=1)


def parsed(folder: Path) -> list[tuple[int, int]]:
    matches = [NAME.fullmatch(path.name) for path in folder.iterdir()]
    assert all(matches)
    return [(int(match[1]), int(match[2])) for match in matches if match]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_market_1501s(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == sorted((*FOLDERS, "synthetic.json"))
    for folder in FOLDERS:
        for path in (made / folder).iterdir():
            with Image.open(path) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


def test_counts_are_what_was_written(made: Path) -> None:
    written = {folder: parsed(made / folder) for folder in FOLDERS}
    gallery = [pid for pid, _ in written["bounding_box_test"]]
    counts = count_images(SMALL)
    assert len(written["bounding_box_train"]) == counts["bounding_box_train"]
    assert len(written["query"]) == counts["query"]
    assert gallery.count(-1) == counts["junk"] > 0
    assert gallery.count(0) == counts["distractors"] > 0
    assert len(gallery) == counts["bounding_box_test"] + counts["junk"] + counts["distractors"]
    assert json.loads((made / "synthetic.json").read_text())["images"] == counts


def test_identities_of_training_and_test_are_disjoint(made: Path) -> None:
    train = {pid for pid, _ in parsed(made / "bounding_box_train")}
    query = {pid for pid, _ in parsed(made / "query")}
    gallery = {pid for pid, _ in parsed(made / "bounding_box_test")}
    assert (len(train), len(query)) == (6, 4)
    assert not train & query
    assert gallery == query | {-1, 0}


def test_each_identity_has_one_query_per_camera_and_a_match_in_another(made: Path) -> None:
    query, gallery = parsed(made / "query"), parsed(made / "bounding_box_test")
    assert len(query) == len(set(query))
    cameras = defaultdict(set)
    for pid, camera in gallery:
        cameras[pid].add(camera)
    for pid, camera in query:
        assert camera in cameras[pid]
        assert cameras[pid] - {camera}


def test_every_training_identity_is_seen_by_two_cameras(made: Path) -> None:
    cameras = defaultdict(set)
    for pid, camera in parsed(made / "bounding_box_train"):
        cameras[pid].add(camera)
    assert min(len(seen) for seen in cameras.values()) >= 2


def test_bytes_depend_on_the_seed_and_not_on_the_processes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "CHUNK", 16)
    two = make_synthetic(tmp_path / "two", SMALL, workers=2)
    assert bytes_of(two) == bytes_of(made)


def test_another_seed_draws_others(made: Path, tmp_path: Path) -> None:
    other = bytes_of(make_synthetic(tmp_path / "other", replace(SMALL, seed=4), workers=1))
    assert not set(other.values()) & set(bytes_of(made).values())


def test_a_group_shares_its_clothes_and_nothing_else_that_shows() -> None:
    for group in range(50):
        members = [make_person(0, 1 + group * 4 + k, 4) for k in range(4)]
        assert len({(person.upper, person.lower) for person in members}) == 1
        for a, b in combinations(members, 2):
            assert a.hair != b.hair
            assert a.shoes.colour != b.shoes.colour
            different = sum(getattr(a, clue) != getattr(b, clue) for clue in ("hair", "hat", "shoes", "logo", "bag"))
            assert different >= 3
            assert a.logo != b.logo


def test_groups_differ_in_their_clothes() -> None:
    clothes = {(person.upper, person.lower) for person in (make_person(0, 1 + 4 * k, 4) for k in range(100))}
    assert len(clothes) == 100


@pytest.mark.parametrize("group_size", [1, MAX_GROUP])
def test_every_group_size_can_be_drawn(tmp_path: Path, group_size: int) -> None:
    config = SyntheticConfig(train_identities=8, test_identities=1, cameras=2, images=2, group_size=group_size)
    assert make_synthetic(tmp_path / "set", config, workers=1).is_dir()


def test_image_size_is_configurable(tmp_path: Path) -> None:
    config = SyntheticConfig(train_identities=2, test_identities=1, cameras=2, images=2, height=192, width=80)
    folder = make_synthetic(tmp_path / "set", config, workers=1)
    with Image.open(next((folder / "query").iterdir())) as image:
        assert image.size == (80, 192)


def test_images_of_one_camera_share_its_colours(made: Path) -> None:
    """The nuisance that a matcher must overcome: cameras differ more than images within a camera do."""
    colours = defaultdict(list)
    for path in (made / "bounding_box_train").iterdir():
        pixels = np.asarray(Image.open(path)).reshape(-1, 3).mean(axis=0)
        colours[path.name.split("_")[1][:2]].append(pixels / pixels.sum())
    means = np.array([np.mean(of_camera, axis=0) for of_camera in colours.values()])
    within = np.mean([np.std(of_camera, axis=0) for of_camera in colours.values()])
    assert means.std(axis=0).mean() > within


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_interrupted_or_failed_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def interrupting(what: str, done: int, total: int, detail: str = "") -> None:
        raise error

    with pytest.raises((KeyboardInterrupt, OutputError)):
        make_synthetic(tmp_path / "set", SMALL, workers=1, report=interrupting)
    assert list(tmp_path.iterdir()) == []


def test_interrupt_ends_the_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "CHUNK", 8)

    def interrupting(what: str, done: int, total: int, detail: str = "") -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path / "set", SMALL, workers=2, report=interrupting)
    assert list(tmp_path.iterdir()) == []


def test_the_cached_set_is_drawn_once_for_each_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMM_HOME", str(tmp_path))
    config = SyntheticConfig(train_identities=2, test_identities=1, cameras=2, images=2)
    folder = cached_synthetic(config)
    drawn = (folder / "synthetic.json").stat().st_mtime_ns
    assert cached_synthetic(config) == folder
    assert (folder / "synthetic.json").stat().st_mtime_ns == drawn
    assert cached_synthetic(replace(config, seed=1)) != folder


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = SyntheticConfig(train_identities=2, test_identities=1, cameras=2, images=2)
    make_synthetic(
        tmp_path / "set", config, workers=1, report=lambda what, done, total, detail="": seen.append((done, total))
    )
    total = sum(count_images(config).values())
    assert seen[-1] == (total, total)


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        make_synthetic(tmp_path, SMALL, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_identities", 1), ("cameras", 1), ("cameras", 10), ("images", 1), ("height", 16), ("seed", -1)],
)
def test_a_value_out_of_range_names_itself_and_the_range(name: str, value: int) -> None:
    with pytest.raises(PmmError, match=rf"{name} is {value}\. Choose \d+ to \d+"):
        SyntheticConfig(**{name: value})


def test_contact_sheet_has_a_row_for_each_identity_and_a_column_for_each_camera() -> None:
    sheet = contact_sheet(SMALL, identities=2)
    assert sheet.size == (4 * (64 + 4) + 4, 2 * (128 + 4) + 4)
