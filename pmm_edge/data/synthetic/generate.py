"""Plan, render and write a synthetic data set in the layout of Market-1501 or, with tracklets, of MARS."""

import hashlib
import io
import json
import signal
import struct
from collections import Counter
from collections.abc import Sequence
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
STEP = 0.25  # radians of the gait from one frame of a tracklet to the next: one step of a leg in half a second, 25 fps
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
    frames: int = _setting(1, 1, 99, "Consecutive frames of each image (2 or more: tracklets in the layout of MARS)")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, (low, high) = getattr(self, setting.name), setting.metadata["range"]
            if not low <= value <= high:
                raise PmmError(f"{setting.name} is {value}", f"Choose {low} to {high}")


DEFAULT = SyntheticConfig()


class Shot(NamedTuple):
    """One image to draw; `number` counts the images or tracklets of `pid` in `camera`, `frame` those of a tracklet."""

    folder: str
    name: str
    pid: int
    camera: int
    number: int
    kind: Literal["detected", "drawn", "junk", "stranger", "clutter"]
    frame: int = 0

    @property
    def path(self) -> str:
        """Path below the folder of the data set. In MARS, a person's images are in one folder, queries included."""
        person = f"bbox_{'train' if self.folder == TRAIN else 'test'}/{self.name.partition('C')[0]}"
        return f"{person if 'C' in self.name else self.folder}/{self.name}"


def plan(config: SyntheticConfig) -> list[Shot]:
    """List all images in a fixed order. As in Market-1501, one box of a test identity in each camera is a query."""
    shots: list[Shot] = []
    tracklets = Counter[tuple[str, int]]()

    def add(folder: str, kind: Any, pid: int, camera: int, number: int = 0) -> None:
        """Name an image `<pid>_c<camera>s<sequence>_<frame>_<box>.jpg`; people pass a camera one after the other.

        The frames of a tracklet are `<pid>C<camera>T<tracklet>F<frame>.jpg`.
        """
        rng = np.random.default_rng((config.seed, 7, pid, camera, number))
        passage, sequence = divmod(pid - 1, SEQUENCES)
        frame = 1 + (passage * config.images + number) * FRAMES_APART + int(rng.integers(FRAMES_APART))
        box = {"drawn": 0, "junk": int(rng.integers(6, 10))}.get(kind, int(rng.integers(1, 6)))
        label = {"junk": "-1", "stranger": "0000", "clutter": "0000"}.get(kind, f"{pid:04d}")
        names = [f"{label}_c{camera}s{sequence + 1}_{frame:06d}_{box:02d}.jpg"]
        if config.frames > 1:
            tracklets[label, camera] += 1
            tracklet = f"{label.replace('-1', '00-1')}C{camera}T{tracklets[label, camera]:04d}"
            names = [f"{tracklet}F{frame:03d}.jpg" for frame in range(1, config.frames + 1)]
        shots.extend(Shot(folder, name, pid, camera, number, kind, frame) for frame, name in enumerate(names))

    people = config.train_identities + config.test_identities
    for pid in range(1, people + 1):
        rng = np.random.default_rng((config.seed, 6, pid))
        count = int(rng.integers(max(2, (config.cameras + 1) // 2), config.cameras + 1))
        first, others = (QUERY, GALLERY) if pid > config.train_identities else (TRAIN, TRAIN)
        for camera in sorted(int(c) + 1 for c in rng.permutation(config.cameras)[:count]):
            add(first, "drawn" if first == QUERY else "detected", pid, camera)
            for number in range(1, config.images):
                add(others, "detected", pid, camera, number)
    gallery = [shot for shot in shots if shot.folder == GALLERY and not shot.frame]
    rng = np.random.default_rng((config.seed, 5))
    for index in sorted(rng.permutation(len(gallery))[: round(config.junk * len(gallery))]):
        add(GALLERY, "junk", gallery[index].pid, gallery[index].camera, gallery[index].number)
    for pid in range(people + 1, people + 1 + round(config.distractors * len(gallery))):
        kind = "clutter" if rng.random() < 0.3 else "stranger"
        add(GALLERY, kind, pid, int(rng.integers(1, config.cameras + 1)))
    return shots


def render(config: SyntheticConfig, shot: Shot) -> bytes:
    """Draw one image as a JPEG file that depends on the configuration and the shot alone, in any order or process."""
    key = shot.pid, shot.camera, shot.number, int(shot.kind == "junk")
    rng = np.random.default_rng((config.seed, 8, *key))  # the frames of a tracklet repeat it
    frame_rng = np.random.default_rng((config.seed, 11, *key, shot.frame)) if shot.frame else rng
    jitter = frame_rng.normal(0, (0.03, 0.012, 0.03)).tolist() if shot.frame else [0.0] * 3
    camera = make_camera(config.seed, shot.camera)
    scale = max(2, round(512 / config.height))  # antialiasing: drawn larger, then averaged
    width, height = config.width * scale, config.height * scale
    walk = np.random.default_rng((config.seed, 10, *key)).normal(0, (0.02, 1.5, 0.02)) * shot.frame
    scene = background(config.seed, shot.camera, camera.horizon, (width, height), rng, jitter[0] + float(walk[0]))
    draw = ImageDraw.Draw(scene, "RGBA")
    figures = _figures(config, shot, camera, rng, jitter, walk.tolist()) if shot.kind != "clutter" else ()
    for pid, x, ground, size, pose in figures:
        person = make_person(config.seed, pid, config.group_size)
        place = x * width, ground * height, size * height * person.height
        draw_person(View(draw, place, pose, camera.light), person)
    if shot.kind != "drawn" and rng.random() < 0.2:
        occlude(draw, width, height, rng)
    return photograph(camera, scene.reduce(scale), rng, frame_rng)


def _figures(
    config: SyntheticConfig,
    shot: Shot,
    camera: Camera,
    rng: np.random.Generator,
    jitter: Sequence[float],
    walk: Sequence[float],
) -> list[tuple[int, float, float, float, Pose]]:
    """Pid, place (x, ground, size as fractions of the image) and pose of the person and, at times, a passer-by.

    `jitter` changes the place in a frame of a tracklet, `walk` is how far the background, the heading and the passer-by
    have moved since its first frame.
    """
    # Tight boxes for the query, a detector's jitter for the gallery, a bad overlap for junk.
    spread = {"drawn": 0.4, "junk": 3.2}.get(shot.kind, 1.0)
    x, ground, size = (rng.normal(0, 1, 3) * spread * (0.06, 0.025, 0.065)).tolist()
    if shot.kind == "junk":
        x += 0.3 if x > 0 else -0.3
    x, ground, size = 0.5 + x + jitter[0], 0.955 + ground + jitter[1], 0.9 * float(np.exp(size + jitter[2]))
    # A person passes a camera in one direction, turns a little within the passage and walks on.
    visit = np.random.default_rng((config.seed, 9, shot.pid, shot.camera))
    heading = camera.heading + float(visit.normal(0, 28)) + (180.0 if visit.random() < 0.3 else 0.0)
    heading += float(rng.normal(0, 14)) + walk[1]
    phase, stride = rng.uniform((0, 0.15), (2 * np.pi, 1.0)).tolist()
    phase += STEP * shot.frame
    stranger = 20000 + int(rng.integers(10000))
    aside, lower, larger = rng.uniform((0.3, -0.03, 0.85), (0.55, 0.03, 1.1)).tolist()
    aside = aside * float(rng.choice((-1, 1))) + walk[2]
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
        if 0 <= row < rows and shot.kind == "drawn" and not shot.frame:
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

    Tracklets, `config.frames` of 2 or more, are written in the layout of MARS.

    `folder` is created; it may exist if it is empty. If drawing is interrupted or fails, nothing remains. The bytes
    depend on `config` alone, not on `workers`, the number of processes (one for each usable core by default). `sheet`
    is a .jpg or .png file for a contact sheet.

    Returns the number of images for training, of queries and in the gallery, named as the folders of Market-1501, and
    separately of the junk and the distractors in the gallery.
    """
    if sheet:
        check_output(sheet, (".jpg", ".jpeg", ".png"))
    shots = plan(config)
    extras = {"junk": "junk", "stranger": "distractors", "clutter": "distractors"}
    kinds = Counter(extras.get(shot.kind, shot.folder) for shot in shots)
    counts = {name: kinds[name] for name in (TRAIN, QUERY, GALLERY, "junk", "distractors")}
    with folder_written_whole(Path(folder)) as temporary:
        for folder_name in {shot.path.rpartition("/")[0] for shot in shots}:
            (temporary / folder_name).mkdir(parents=True)
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
        if config.frames > 1:
            _write_mars_lists(temporary / "info", shots)
        facts = {"generator": VERSION, "config": asdict(config), "images": counts}
        (temporary / "synthetic.json").write_text(json.dumps(facts, indent=2) + "\n")
    if sheet:
        with written_whole(sheet) as unfinished:
            contact_sheet(config).save(unfinished, "PNG" if sheet.suffix.lower() == ".png" else "JPEG", quality=88)
    return counts


def _write(config: SyntheticConfig, folder: Path, shot: Shot) -> None:
    (folder / shot.path).write_bytes(render(config, shot))


def _write_mars_lists(info: Path, shots: Sequence[Shot]) -> None:
    """Write the names of the images in training and test set, their tracklets, and which of these are queries."""
    info.mkdir()
    for split in ("train", "test"):
        own = [shot for shot in shots if (shot.folder == TRAIN) == (split == "train")]
        starts = [row for row, shot in enumerate(own) if not shot.frame]
        ends = [*starts[1:], len(own)]
        tracks = [
            (start + 1, end, int(own[start].name.partition("C")[0].lstrip("0") or 0), own[start].camera)
            for start, end in zip(starts, ends, strict=True)
        ]
        (info / f"{split}_name.txt").write_text("".join(f"{shot.name}\n" for shot in own))
        _write_matlab(info / f"tracks_{split}_info.mat", f"track_{split}_info", tracks)
    queries = [number for number, start in enumerate(starts, 1) if own[start].folder == QUERY]
    _write_matlab(info / "query_IDX.mat", "query_IDX", [queries])


def _write_matlab(path: Path, name: str, matrix: Sequence[Sequence[int]]) -> None:
    """Write a matrix of doubles as a MATLAB 5 file ("MAT-File Format", The MathWorks)."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    values = np.array(matrix, "<f8")
    flags, shape = struct.pack("<II", 6, 0), struct.pack("<ii", *values.shape)
    array = element(6, flags) + element(5, shape) + element(1, name.encode()) + element(9, values.tobytes("F"))
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + bytes(8) + b"\0\1IM" + element(14, array))


def cached_synthetic(config: SyntheticConfig = DEFAULT, *, report: Report = silent) -> Path:
    """Return the folder of a synthetic data set in the user's cache folder; draw it if it does not exist."""
    settings = asdict(config)
    if config.frames == 1:
        del settings["frames"]  # sets that were drawn before there were tracklets keep their folders
    recipe = json.dumps([VERSION, settings])
    folder = cache_folder() / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        try:
            make_synthetic(folder, config, report=report)
        except OutputError:
            if not folder.exists():  # otherwise another process was faster, with the same bytes
                raise
    return folder
