"""Plan, render and write a synthetic data set in the layout of Market-1501."""

import hashlib
import io
import json
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from pmm_edge.console import Report, silent
from pmm_edge.data.dataset import GALLERY, QUERY, TRAIN
from pmm_edge.data.synthetic.figure import Pose, View, draw_person
from pmm_edge.data.synthetic.person import MAX_GROUP, make_person
from pmm_edge.data.synthetic.scene import Camera, background, make_camera, occlude, photograph
from pmm_edge.errors import OutputError, PmmError
from pmm_edge.files import cache_folder, check_output, folder_written_whole, written_whole
from pmm_edge.machine import threads

VERSION = 1  # the same version of the generator, configuration and seed give the same bytes
SEQUENCES, FRAMES_APART = 6, 12
CHUNK, SHEET_GAP = 64, 4


def _setting(default: float, low: float, high: float, text: str) -> Any:
    return field(default=default, metadata={"range": (low, high), "help": text})


@dataclass(frozen=True)
class SyntheticConfig:
    """What to draw. The defaults give about 3,500 training and 2,450 test images."""

    train_identities: int = _setting(200, 2, 4000, "People in bounding_box_train")
    test_identities: int = _setting(100, 1, 4000, "Other people, in query and bounding_box_test")
    cameras: int = _setting(6, 2, 9, "Number of cameras (each person passes at least half of them)")
    images: int = _setting(4, 2, 32, "Images of each person in each camera")
    group_size: int = _setting(4, 1, MAX_GROUP, "People who wear the same upper and lower garment")
    height: int = _setting(128, 32, 512, "Image height in pixels")
    width: int = _setting(64, 16, 512, "Image width in pixels")
    seed: int = _setting(0, 0, 2**31 - 1, "Random seed (the same seed gives the same files)")
    distractors: float = _setting(0.3, 0.0, 4.0, "Images of strangers and clutter (0000) per gallery image of a person")
    junk: float = _setting(0.15, 0.0, 1.0, "Badly cut images (-1) per gallery image of a person")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), setting.metadata["range"]
            if not low <= value <= high:
                raise PmmError(f"{setting.name} is {value}", f"Choose {low} to {high}")


DEFAULT = SyntheticConfig()


class Shot(NamedTuple):
    """One image to draw; `number` counts the images of `pid` in `camera`."""

    folder: str
    name: str
    pid: int
    camera: int
    number: int
    kind: Literal["detected", "drawn", "junk", "stranger", "clutter"]


def plan(config: SyntheticConfig) -> list[Shot]:
    """List all images in a fixed order. As in Market-1501, one box of a test identity in each camera is a query."""
    shots: list[Shot] = []

    def add(folder: str, kind: Any, pid: int, camera: int, number: int = 0) -> None:
        """Name an image `<pid>_c<camera>s<sequence>_<frame>_<box>.jpg`; people pass a camera one after the other."""
        rng = np.random.default_rng((config.seed, 7, pid, camera, number))
        passage, sequence = divmod(pid - 1, SEQUENCES)
        frame = 1 + (passage * config.images + number) * FRAMES_APART + int(rng.integers(FRAMES_APART))
        box = {"drawn": 0, "junk": int(rng.integers(6, 10))}.get(kind, int(rng.integers(1, 6)))
        label = {"junk": "-1", "stranger": "0000", "clutter": "0000"}.get(kind, f"{pid:04d}")
        name = f"{label}_c{camera}s{sequence + 1}_{frame:06d}_{box:02d}.jpg"
        shots.append(Shot(folder, name, pid, camera, number, kind))

    people = config.train_identities + config.test_identities
    for pid in range(1, people + 1):
        rng = np.random.default_rng((config.seed, 6, pid))
        count = int(rng.integers(max(2, (config.cameras + 1) // 2), config.cameras + 1))
        first, others = (QUERY, GALLERY) if pid > config.train_identities else (TRAIN, TRAIN)
        for camera in sorted(int(c) + 1 for c in rng.permutation(config.cameras)[:count]):
            add(first, "drawn" if first == QUERY else "detected", pid, camera)
            for number in range(1, config.images):
                add(others, "detected", pid, camera, number)
    gallery = [shot for shot in shots if shot.folder == GALLERY]
    rng = np.random.default_rng((config.seed, 5))
    for index in sorted(rng.permutation(len(gallery))[: round(config.junk * len(gallery))]):
        add(GALLERY, "junk", gallery[index].pid, gallery[index].camera, gallery[index].number)
    for pid in range(people + 1, people + 1 + round(config.distractors * len(gallery))):
        kind = "clutter" if rng.random() < 0.3 else "stranger"
        add(GALLERY, kind, pid, int(rng.integers(1, config.cameras + 1)))
    return shots


def render(config: SyntheticConfig, shot: Shot) -> bytes:
    """Draw one image as a JPEG file that depends on the configuration and the shot alone, in any order or process."""
    rng = np.random.default_rng((config.seed, 8, shot.pid, shot.camera, shot.number, int(shot.kind == "junk")))
    camera = make_camera(config.seed, shot.camera)
    scale = max(2, round(512 / config.height))  # antialiasing: drawn larger, then averaged
    width, height = config.width * scale, config.height * scale
    scene = background(config.seed, shot.camera, camera.horizon, (width, height), rng)
    draw = ImageDraw.Draw(scene, "RGBA")
    for pid, x, ground, size, pose in _figures(config, shot, camera, rng) if shot.kind != "clutter" else ():
        person = make_person(config.seed, pid, config.group_size)
        place = x * width, ground * height, size * height * person.height
        draw_person(View(draw, place, pose, camera.light), person)
    if shot.kind != "drawn" and rng.random() < 0.2:
        occlude(draw, width, height, rng)
    return photograph(camera, scene.reduce(scale), rng)


def _figures(
    config: SyntheticConfig, shot: Shot, camera: Camera, rng: np.random.Generator
) -> list[tuple[int, float, float, float, Pose]]:
    """Pid, place (x, ground, size as fractions of the image) and pose of the person and, at times, a passer-by."""
    # Tight boxes for the query, a detector's jitter for the gallery, a bad overlap for junk.
    spread = {"drawn": 0.4, "junk": 3.2}.get(shot.kind, 1.0)
    x, ground, size = (rng.normal(0, 1, 3) * spread * (0.06, 0.025, 0.065)).tolist()
    if shot.kind == "junk":
        x += 0.3 if x > 0 else -0.3
    x, ground, size = 0.5 + x, 0.955 + ground, 0.9 * float(np.exp(size))
    # A person passes a camera in one direction, turns a little within the passage and walks on.
    visit = np.random.default_rng((config.seed, 9, shot.pid, shot.camera))
    heading = camera.heading + float(visit.normal(0, 28)) + (180.0 if visit.random() < 0.3 else 0.0)
    heading += float(rng.normal(0, 14))
    phase, stride = rng.uniform((0, 0.15), (2 * np.pi, 1.0)).tolist()
    stranger = 20000 + int(rng.integers(10000))
    aside, lower, larger = rng.uniform((0.3, -0.03, 0.85), (0.55, 0.03, 1.1)).tolist()
    aside *= float(rng.choice((-1, 1)))
    passing = float(rng.uniform(0, 360)), camera.pitch, phase + 2, stride
    passer_by = stranger, x + aside, ground + lower, size * larger, passing
    crowded = 0.5 if shot.kind == "drawn" else float(rng.random())
    person = shot.pid, x, ground, size, (heading, camera.pitch, phase, stride)
    return [passer_by] * (crowded < 0.12) + [person] + [passer_by] * (crowded > 0.95)


def contact_sheet(config: SyntheticConfig = DEFAULT, identities: int = 8) -> Image.Image:
    """Draw test identities as rows and cameras as columns, with a gap where a camera has not seen the person."""
    first, rows = config.train_identities + 1, min(identities, config.test_identities)
    wide, high = config.width + SHEET_GAP, config.height + SHEET_GAP
    sheet = Image.new("RGB", (wide * config.cameras + SHEET_GAP, high * rows + SHEET_GAP), (250, 250, 250))
    for shot in plan(config):
        row, column = shot.pid - first, shot.camera - 1
        if 0 <= row < rows and shot.kind == "drawn":
            picture = Image.open(io.BytesIO(render(config, shot)))
            sheet.paste(picture, (SHEET_GAP + column * wide, SHEET_GAP + row * high))
    return sheet


def make_synthetic(
    folder: Path,
    config: SyntheticConfig = DEFAULT,
    *,
    workers: int | None = None,
    sheet: Path | None = None,
    report: Report = silent,
) -> dict[str, int]:
    """Write a synthetic data set in the layout of Market-1501, and its configuration in `synthetic.json`.

    `folder` is created; it may exist if it is empty. If drawing is interrupted or fails, nothing remains. The bytes
    depend on `config` alone, not on `workers`, the number of processes (one for each usable core by default). `sheet`
    is a .jpg or .png file for a contact sheet.

    Returns the number of images in each folder, and separately of the junk and the distractors in the gallery.
    """
    if sheet:
        check_output(sheet, (".jpg", ".jpeg", ".png"))
    shots = plan(config)
    extras = {"junk": "junk", "stranger": "distractors", "clutter": "distractors"}
    kinds = Counter(extras.get(shot.kind, shot.folder) for shot in shots)
    counts = {name: kinds[name] for name in (TRAIN, QUERY, GALLERY, "junk", "distractors")}
    with folder_written_whole(Path(folder)) as temporary:
        for name in (TRAIN, QUERY, GALLERY):
            (temporary / name).mkdir()
        write, workers = partial(_write, config, temporary), workers or threads()
        # Spawned, not forked: threads of the caller (torch, CUDA) do not survive a fork. The parent handles Ctrl-C.
        pool = ProcessPoolExecutor(workers, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
        try:
            alone = workers == 1 or len(shots) <= CHUNK
            for done, _ in enumerate(map(write, shots) if alone else pool.map(write, shots, chunksize=CHUNK), 1):
                report("drawing", done, len(shots))
        except BrokenProcessPool as error:
            remedy = "In a script, call make_synthetic under `if __name__ == '__main__':` or with workers=1"
            raise PmmError("a process that draws images ended early", remedy) from error
        finally:  # no process may still write into the folder when it is removed
            pool.shutdown(wait=True, cancel_futures=True)
        facts = {"generator": VERSION, "config": asdict(config), "images": counts}
        (temporary / "synthetic.json").write_text(json.dumps(facts, indent=2) + "\n")
    if sheet:
        with written_whole(sheet) as unfinished:
            contact_sheet(config).save(unfinished, "PNG" if sheet.suffix.lower() == ".png" else "JPEG", quality=88)
    return counts


def _write(config: SyntheticConfig, folder: Path, shot: Shot) -> None:
    (folder / shot.folder / shot.name).write_bytes(render(config, shot))


def cached_synthetic(config: SyntheticConfig = DEFAULT, *, report: Report = silent) -> Path:
    """Return the folder of a synthetic data set in the user's cache folder; draw it if it does not exist."""
    recipe = json.dumps([VERSION, asdict(config)])
    folder = cache_folder() / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        try:
            make_synthetic(folder, config, report=report)
        except OutputError:
            if not folder.exists():  # otherwise another process was faster, with the same bytes
                raise
    return folder
