"""The data set: which images it has, how each is rendered, and writing them in Market-1501's layout."""

from __future__ import annotations

import hashlib
import io
import json
import signal
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from pmm_edge.console import Report, silent
from pmm_edge.data.layouts import GALLERY, QUERY, TRAIN
from pmm_edge.data.synthetic.canvas import Pose, View
from pmm_edge.data.synthetic.figure import draw_person
from pmm_edge.data.synthetic.person import MAX_GROUP, make_person
from pmm_edge.data.synthetic.scene import Camera, background, encode, expose, make_camera, occlude, shadow
from pmm_edge.errors import OutputError, PmmError
from pmm_edge.files import cache_folder, folder_written_whole
from pmm_edge.machine import threads

VERSION = 1
"""Of the generator: the same version, configuration and seed give the same bytes."""
SEQUENCES = 6
FRAMES_APART = 12
CHUNK = 64
LIMITS: dict[str, tuple[float, float]] = {
    "train_identities": (2, 4000),
    "test_identities": (1, 4000),
    "cameras": (2, 9),
    "images": (2, 32),
    "group_size": (1, MAX_GROUP),
    "height": (32, 512),
    "width": (16, 512),
    "seed": (0, 2**31 - 1),
    "distractors": (0.0, 4.0),
    "junk": (0.0, 1.0),
}

Kind = Literal["detected", "drawn", "junk", "stranger", "clutter"]


@dataclass(frozen=True)
class SyntheticConfig:
    """What to draw. The defaults give about 3,600 training images and 2,400 test images.

    Raises:
        PmmError: a value out of range (`LIMITS`).
    """

    train_identities: int = 200
    test_identities: int = 100
    cameras: int = 6
    images: int = 4
    """Of one identity in one camera that it appears in; it appears in at least half of the cameras."""
    group_size: int = 4
    """Identities that share their upper and lower garment."""
    height: int = 128
    width: int = 64
    seed: int = 0
    distractors: float = 0.3
    """Images of strangers and of clutter (`0000_...`) for each gallery image of an identity."""
    junk: float = 0.15
    """Badly cut images (`-1_...`) for each gallery image of an identity."""

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise PmmError(f"{name} is {value}", f"Choose {low} to {high}")


@dataclass(frozen=True)
class Shot:
    """One image to be drawn: `number` counts the images of `pid` in `camera`."""

    folder: str
    name: str
    pid: int
    camera: int
    number: int
    kind: Kind


def plan(config: SyntheticConfig) -> list[Shot]:
    """Every image of the data set, in a fixed order."""
    people = config.train_identities + config.test_identities
    shots = [shot for pid in range(1, people + 1) for shot in _visits(config, pid)]
    gallery = [shot for shot in shots if shot.folder == GALLERY]
    rng = np.random.default_rng((config.seed, 5))
    for index in sorted(rng.permutation(len(gallery))[: round(config.junk * len(gallery))]):
        shot = gallery[index]
        shots.append(_shot(config, GALLERY, shot.pid, shot.camera, shot.number, "junk"))
    for extra in range(round(config.distractors * len(gallery))):
        kind: Kind = "clutter" if rng.random() < 0.3 else "stranger"
        camera = int(rng.integers(1, config.cameras + 1))
        shots.append(_shot(config, GALLERY, people + 1 + extra, camera, 0, kind))
    return shots


def cameras_of(config: SyntheticConfig, pid: int) -> list[int]:
    """The cameras that identity `pid` walks past: at least two, at least half of them."""
    rng = np.random.default_rng((config.seed, 6, pid))
    count = int(rng.integers(max(2, (config.cameras + 1) // 2), config.cameras + 1))
    return sorted(int(c) + 1 for c in rng.permutation(config.cameras)[:count])


def _visits(config: SyntheticConfig, pid: int) -> Iterator[Shot]:
    """All images of one identity. As in Market-1501, its query is one hand-drawn box in each camera."""
    tested = pid > config.train_identities
    for camera in cameras_of(config, pid):
        for number in range(config.images):
            if tested and number == 0:
                yield _shot(config, QUERY, pid, camera, number, "drawn")
            else:
                yield _shot(config, GALLERY if tested else TRAIN, pid, camera, number, "detected")


def _shot(config: SyntheticConfig, folder: str, pid: int, camera: int, number: int, kind: Kind) -> Shot:
    """Name an image `<pid>_c<camera>s<sequence>_<frame>_<box>.jpg`; people pass a camera one after the other."""
    rng = np.random.default_rng((config.seed, 7, pid, camera, number))
    passage, sequence = divmod(pid - 1, SEQUENCES)
    first = 1 + passage * config.images * FRAMES_APART
    frame = first + number * FRAMES_APART + int(rng.integers(FRAMES_APART))
    box = {"drawn": 0, "junk": int(rng.integers(6, 10))}.get(kind, int(rng.integers(1, 6)))
    label = {"junk": "-1", "stranger": "0000", "clutter": "0000"}.get(kind, f"{pid:04d}")
    name = f"{label}_c{camera}s{sequence + 1}_{frame:06d}_{box:02d}.jpg"
    return Shot(folder, name, pid, camera, number, kind)


# --- rendering -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """Where a detector's box puts the person: fractions of the image."""

    x: float
    ground: float
    size: float


def render(config: SyntheticConfig, shot: Shot) -> bytes:
    """Draw one image and return it as a JPEG of `config.width` × `config.height`.

    It depends on the configuration and the shot alone, so images can be drawn in any order and process.
    """
    rng = np.random.default_rng((config.seed, 8, shot.pid, shot.camera, shot.number, int(shot.kind == "junk")))
    camera = make_camera(config.seed, shot.camera)
    scale = max(2, round(512 / config.height))  # antialiasing: drawn larger, then averaged
    size = config.width * scale, config.height * scale
    scene = background(config.seed, shot.camera, camera.horizon, size, rng)
    draw = ImageDraw.Draw(scene, "RGBA")
    if shot.kind != "clutter":
        _people(config, shot, camera, draw, size, rng)
    if shot.kind != "drawn" and rng.random() < 0.2:
        occlude(draw, *size, rng)
    return encode(camera, expose(camera, scene.reduce(scale), rng))


def _people(
    config: SyntheticConfig,
    shot: Shot,
    camera: Camera,
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> None:
    """The person of the shot and, in some images, a passer-by behind or in front of it."""
    box, pose = _box(shot, rng), _pose(config, shot, camera, rng)
    paint = partial(_paint, config, camera, draw, size)
    passer_by = partial(paint, 20000 + int(rng.integers(10000)), _beside(box, rng), _other_way(pose, rng))
    crowded = 0.5 if shot.kind == "drawn" else float(rng.random())
    if crowded < 0.12:
        passer_by()
    paint(shot.pid, box, pose)
    if crowded > 0.95:
        passer_by()


def _beside(box: Box, rng: np.random.Generator) -> Box:
    side, ground, size = rng.uniform((0.3, -0.03, 0.85), (0.55, 0.03, 1.1))
    return Box(box.x + float(rng.choice((-1, 1)) * side), box.ground + float(ground), box.size * float(size))


def _other_way(pose: Pose, rng: np.random.Generator) -> Pose:
    return replace(pose, heading=float(rng.uniform(0, 360)), phase=pose.phase + 2)


def _paint(
    config: SyntheticConfig,
    camera: Camera,
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    pid: int,
    box: Box,
    pose: Pose,
) -> None:
    person = make_person(config.seed, pid, config.group_size)
    x, ground, height = box.x * size[0], box.ground * size[1], box.size * size[1] * person.body.height
    shadow(draw, x, ground, height, camera.light)
    draw_person(View(draw, x, ground, height, pose, camera.light), person)


def _box(shot: Shot, rng: np.random.Generator) -> Box:
    """Tight boxes for the query, a detector's jitter for the gallery, a poor overlap for junk."""
    spread = {"drawn": 0.4, "junk": 3.2}.get(shot.kind, 1.0)
    x, ground, size = rng.normal(0, 1, 3) * spread * (0.06, 0.025, 0.065)
    if shot.kind == "junk":
        x += 0.3 if x > 0 else -0.3
    return Box(0.5 + float(x), 0.955 + float(ground), 0.9 * float(np.exp(size)))


def _pose(config: SyntheticConfig, shot: Shot, camera: Camera, rng: np.random.Generator) -> Pose:
    """A person passes a camera in one direction; within the passage it turns a little and walks on."""
    visit = np.random.default_rng((config.seed, 9, shot.pid, shot.camera))
    heading = camera.heading + float(visit.normal(0, 28)) + (180.0 if visit.random() < 0.3 else 0.0)
    return Pose(
        heading=heading + float(rng.normal(0, 14)),
        pitch=camera.pitch,
        phase=float(rng.uniform(0, 2 * np.pi)),
        stride=float(rng.uniform(0.15, 1.0)),
    )


# --- writing -------------------------------------------------------------------------------------------------


def count_images(config: SyntheticConfig) -> dict[str, int]:
    """Images in each folder of the data set, junk and distractors of the gallery counted apart."""
    counts = Counter(
        {"junk": "junk", "stranger": "distractors", "clutter": "distractors"}.get(shot.kind, shot.folder)
        for shot in plan(config)
    )
    return {name: counts[name] for name in (TRAIN, QUERY, GALLERY, "junk", "distractors")}


def make_synthetic(
    folder: Path, config: SyntheticConfig | None = None, *, workers: int | None = None, report: Report = silent
) -> Path:
    """Write a synthetic data set in the layout of Market-1501 and return `folder`.

    `synthetic.json` beside the images says what they were made from. The bytes depend on the configuration
    alone, not on `workers`, the number of processes (default: one for each usable core). Interrupted or failed,
    nothing is left under `folder`.

    Raises:
        OutputError: `folder` exists and is not empty, or cannot be written.
    """
    config = config or SyntheticConfig()
    shots = plan(config)
    with folder_written_whole(Path(folder)) as temporary:
        for name in (TRAIN, QUERY, GALLERY):
            (temporary / name).mkdir()
        done = 0
        # Closed before the folder is removed: on an error no process may still write into it.
        with closing(_write_all(config, shots, temporary, workers or threads())) as chunks:
            for written in chunks:
                done += written
                report("drawing", done, len(shots))
        facts = {"generator": VERSION, "config": asdict(config), "images": count_images(config)}
        (temporary / "synthetic.json").write_text(json.dumps(facts, indent=2) + "\n")
    return Path(folder)


def _write_all(config: SyntheticConfig, shots: list[Shot], folder: Path, workers: int) -> Generator[int, None, None]:
    """Write all shots; yield the number of each chunk that is done."""
    chunks = [shots[start : start + CHUNK] for start in range(0, len(shots), CHUNK)]
    if workers == 1 or len(chunks) == 1:
        for chunk in chunks:
            yield _write_chunk(config, folder, chunk)
        return
    # Spawned, not forked: the caller may hold threads (torch, CUDA) that do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_leave_interrupt_to_parent)
    try:
        for future in as_completed([pool.submit(_write_chunk, config, folder, chunk) for chunk in chunks]):
            yield future.result()
    except BrokenProcessPool as error:
        raise PmmError(
            "a process that draws images ended early",
            "In a script, call make_synthetic under `if __name__ == '__main__':` or with workers=1",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_interrupt_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_chunk(config: SyntheticConfig, folder: Path, shots: list[Shot]) -> int:
    for shot in shots:
        (folder / shot.folder / shot.name).write_bytes(render(config, shot))
    return len(shots)


def cached_synthetic(config: SyntheticConfig | None = None, *, report: Report = silent) -> Path:
    """The folder of a synthetic data set under the user's cache folder, drawn where it is not there yet.

    Raises:
        OutputError: it cannot be written.
    """
    config = config or SyntheticConfig()
    recipe = json.dumps([VERSION, asdict(config)])
    folder = cache_folder() / f"synthetic-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.exists():
        try:
            make_synthetic(folder, config, report=report)
        except OutputError:
            if not folder.exists():  # else another process finished it first, with the same bytes
                raise
    return folder


GAP = 4


def contact_sheet(config: SyntheticConfig | None = None, identities: int = 8) -> Image.Image:
    """Test identities as rows, cameras as columns; a gap where a camera never saw the person.

    The rows follow the identities' numbers, so neighbours share their clothes (`SyntheticConfig.group_size`).
    """
    config = config or SyntheticConfig()
    first = config.train_identities + 1
    pids = range(first, first + min(identities, config.test_identities))
    cell_width, cell_height = config.width + GAP, config.height + GAP
    sheet = Image.new("RGB", (cell_width * config.cameras + GAP, cell_height * len(pids) + GAP), (250, 250, 250))
    for shot in plan(config):
        row = shot.pid - first
        if 0 <= row < len(pids) and shot.kind in ("drawn", "detected") and shot.number == 0:
            place = GAP + (shot.camera - 1) * cell_width, GAP + row * cell_height
            sheet.paste(_picture(config, shot), place)
    return sheet


def _picture(config: SyntheticConfig, shot: Shot) -> Image.Image:
    return Image.open(io.BytesIO(render(config, shot)))
