"""The synthetic data set: the same seed draws the same people, in the layout of Market-1501."""

import json
import re
from collections import defaultdict
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.dataset import MARS, scan
from pmm_edge.data.people import SplitRule
from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic, contact_sheet, generate, make_synthetic
from pmm_edge.data.synthetic.person import MAX_GROUP, make_person
from pmm_edge.errors import OutputError, PmmError

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(r"(-1|\d{4})_c([1-9])s([1-6])_(\d{6})_(\d{2})\.jpg")
SMALL = SyntheticConfig(train_identities=6, test_identities=4, cameras=4, images=2, seed=3)
TINY = SyntheticConfig(train_identities=2, test_identities=1, cameras=2, images=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    counts = make_synthetic(folder, SMALL, workers=1, sheet=folder.with_suffix(".png"))
    assert json.loads((folder / "synthetic.json").read_text())["images"] == counts
    return folder


def labels(folder):
    """Identity and camera of each image, from its name."""
    matches = [NAME.fullmatch(path.name) for path in folder.iterdir()]
    return [(int(match[1]), int(match[2])) for match in matches]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_seed_always_draws_the_same_people(made):
    """Trained networks and published figures depend on them. JPEG bytes also depend on the version of Pillow."""
    names = ["0001_c1s1_000002_03.jpg", "0005_c2s5_000004_01.jpg", "-1_c2s1_000048_07.jpg"]
    assert [shot.name for shot in generate.plan(SMALL)][::30] == names
    person = make_person(3, 40, 4)
    assert person[:4] == pytest.approx((1.0378204, 1.0717136, 0.9664897, 1.0339187), abs=1e-6)
    assert person.upper == ("jacket", (54, 56, 62), "plain", (196, 174, 140))
    assert (person.hair.kind, person.shoes.kind, person.logo.kind) == ("short", "trainers", "cross")
    assert person.bag[:2] == ("shoulder bag", (108, 72, 46)) and person.left_handed
    sheet = Image.open(made.with_suffix(".png"))
    assert sheet.size == (4 * (64 + 4) + 4, 4 * (128 + 4) + 4)
    colors = np.asarray(sheet.resize((4, 2), Image.Resampling.BOX, (0, 0, 276, 268))).astype(int)
    gap = [250, 250, 250]
    expected = [[gap, [154, 133, 144], [92, 105, 87], gap], [[127, 135, 130], gap, gap, [182, 162, 171]]]
    assert np.abs(colors - expected).max() <= 2


def test_the_layout_is_that_of_market_1501(made):
    assert sorted(path.name for path in made.iterdir()) == sorted((*FOLDERS, "synthetic.json"))
    for path in made.glob("*/*"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))
    train, query, gallery = (labels(made / folder) for folder in FOLDERS)
    counts, pids = json.loads((made / "synthetic.json").read_text())["images"], [pid for pid, _ in gallery]
    assert (len(train), len(query)) == (counts["bounding_box_train"], counts["query"])
    assert (pids.count(-1), pids.count(0)) == (counts["junk"], counts["distractors"]) and min(pids.count(-1), 1) == 1
    assert len(gallery) == counts["bounding_box_test"] + counts["junk"] + counts["distractors"]
    people = [{pid for pid, _ in split} for split in (train, query, gallery)]
    assert (len(people[0]), len(people[1])) == (6, 4) and not people[0] & people[1]
    assert people[2] == people[1] | {-1, 0}
    assert len(query) == len(set(query))  # one query for each camera
    cameras = defaultdict(set)
    for pid, camera in [*train, *gallery]:
        cameras[pid].add(camera)
    assert all(camera in cameras[pid] and cameras[pid] - {camera} for pid, camera in query)
    assert min(len(cameras[pid]) for pid in people[0]) >= 2


def test_bytes_depend_on_the_seed_and_not_on_the_processes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 16)
    make_synthetic(tmp_path / "two", SMALL, workers=2)
    assert contents(tmp_path / "two") == contents(made)
    other = replace(SMALL, seed=4)
    images = {generate.render(other, shot) for shot in generate.plan(other)[:10]}
    assert not images & set(contents(made).values())


def test_tracklets_start_with_the_image_and_are_read_back_as_mars(made, tmp_path):
    frames = 4
    config, folder = replace(SMALL, frames=frames), tmp_path / "tracklets"
    counts = make_synthetic(folder, config, workers=2)
    assert counts == {
        name: frames * count for name, count in json.loads((made / "synthetic.json").read_text())["images"].items()
    }
    dataset = scan(folder)
    assert (dataset.layout, dataset.reading.split_rule) == (MARS, SplitRule.GIVEN)
    single, drawn = generate.plan(SMALL), generate.plan(config)
    assert [shot._replace(name="") for shot in drawn[::frames]] == [shot._replace(name="") for shot in single]
    for image, first in zip(single, drawn[::frames], strict=True):
        assert (folder / first.path).read_bytes() == (made / image.path).read_bytes()
    for name, before in scan(made).splits.items():
        split = dataset.splits[name]
        tracks, first, sizes = np.unique(split.tracks, return_index=True, return_counts=True)
        assert len(tracks) == len(before) and set(sizes) == {frames}
        labels = sorted(zip(split.pids[first], split.camids[first], strict=True))
        assert labels == sorted(zip(before.pids, before.camids, strict=True))
    # Consecutive frames are similar, without being the same image; other tracklets of the person differ more.
    shots = [shot for shot in drawn if shot.pid == drawn[0].pid and shot.camera == drawn[0].camera]
    pixels = np.array([np.asarray(Image.open(folder / shot.path)) for shot in shots], float)
    distances = np.abs(pixels[:, None] - pixels[None]).mean(axis=(2, 3, 4))
    same = np.array([[a.number == b.number for b in shots] for a in shots])
    off = ~np.eye(len(shots), dtype=bool)
    assert distances[same & off].min() > 1 and distances[same].max() < distances[~same].mean()


def test_a_group_wears_the_same_clothes_and_differs_in_details():
    for group in range(50):
        members = [make_person(0, 1 + group * 4 + k, 4) for k in range(4)]
        assert len({(person.upper, person.lower) for person in members}) == 1
        for a, b in combinations(members, 2):
            assert a.hair != b.hair and a.logo != b.logo and a.shoes.color != b.shoes.color
            different = sum(getattr(a, clue) != getattr(b, clue) for clue in ("hair", "hat", "shoes", "logo", "bag"))
            assert different >= 3
    clothes = {(person.upper, person.lower) for person in (make_person(0, 1 + 4 * k, 4) for k in range(100))}
    assert len(clothes) == 100


def test_group_and_image_sizes():
    for group_size, height, width in ((1, 64, 32), (MAX_GROUP, 192, 80)):
        config = replace(TINY, train_identities=8, group_size=group_size, height=height, width=width)
        assert contact_sheet(config).size == (2 * (width + 4) + 4, height + 8)


@pytest.mark.parametrize(("error", "workers"), [(OSError("disk full"), 1), (KeyboardInterrupt, 2)])
def test_interrupted_or_failed_drawing_leaves_nothing(tmp_path, monkeypatch, error, workers):
    monkeypatch.setattr(generate, "CHUNK", 8)

    def interrupting(what, done, total, detail=""):
        raise error

    with pytest.raises((KeyboardInterrupt, OutputError)):
        make_synthetic(tmp_path / "set", SMALL, workers=workers, report=interrupting)
    assert list(tmp_path.iterdir()) == []


def test_the_cached_set_is_drawn_once_for_each_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PMM_HOME", str(tmp_path))
    folder = cached_synthetic(TINY)
    drawn = (folder / "synthetic.json").stat().st_mtime_ns
    assert cached_synthetic(TINY) == folder != cached_synthetic(replace(TINY, seed=1))
    assert (folder / "synthetic.json").stat().st_mtime_ns == drawn
    assert cached_synthetic(TINY).name == "synthetic-ea8a62411cc0"  # since before there were tracklets
    assert cached_synthetic(replace(TINY, frames=2)) != folder


def test_a_value_out_of_range_is_named():
    for name, value in {"train_identities": 1, "cameras": 10, "images": 1, "height": 16, "seed": -1}.items():
        with pytest.raises(PmmError, match=name):
            SyntheticConfig(**{name: value})
