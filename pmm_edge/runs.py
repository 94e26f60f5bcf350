"""Run folders: what one training wrote and what was exported from it, found again without naming it.

runs/20261122-174200-quick/
run.json  run.lock  config.toml  log.txt  metrics.jsonl  tensorboard/  last.pt  best.pt  export/model.onnx  bench.json
reduced-256/  (of `pmm export --embedding-size`: run.json  best.pt  export/model.onnx  bench.json)
"""

import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from itertools import count
from pathlib import Path

from pmm_edge.errors import DataError, ModelError, OutputError, PmmError
from pmm_edge.files import decode_json, encode_json, sha256, written_whole

RUNS, EXPORT_FOLDER, REDUCED = Path("runs"), "export", "reduced-"
ABOUT, CONFIG, BEST, LAST = "run.json", "config.toml", "best.pt", "last.pt"
ELSEWHERE = RUNS / "elsewhere.txt"
"""Names the last run that was started here in another folder, so that commands without arguments find it."""


@dataclass(frozen=True)
class AboutRun:
    """Contents of `run.json`: what later commands need to know about a run."""

    name: str
    data: str  # absolute path of the data set, of the first one if there are several
    version: str  # of pmm-edge, which started the run
    layout: str | None = None  # of the data set, as it was read
    started: str = ""  # UTC, ISO 8601
    more: list[tuple[str, str]] = field(default_factory=list)  # paths and layouts of the other data sets


def new_run_path(name: str) -> Path:
    """Create the default folder of a new run, `runs/<time>-<name>`, with a suffix if another run has just taken it."""
    folder = first = RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    try:
        RUNS.mkdir(exist_ok=True)
        for number in count(2):
            with suppress(FileExistsError):
                folder.mkdir()  # atomic: one of several processes succeeds
                break
            folder = Path(f"{first}-{number}")
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
    return folder


def new_run_folder(about: AboutRun, folder: Path) -> Path:
    """Create the folder of a run and its `run.json`; raise OutputError if that fails or it belongs to another run."""
    if folder.is_file() or ((folder / ABOUT).exists() and not never_began(folder)):
        problem = f"{folder} already holds a run or a file"
        raise OutputError(problem, "Continue that run with --resume, or choose another --out")
    write_about_run(folder, replace(about, started=datetime.now(timezone.utc).isoformat()))
    if RUNS.is_dir() and folder.parent.resolve() != RUNS.resolve():
        with suppress(OSError):
            ELSEWHERE.write_bytes(os.fsencode(folder.parent.resolve() / folder.name))
    return folder


def never_began(folder: Path) -> bool:
    """Whether a run was killed before it wrote its settings, so that nothing in it can be lost."""
    return (folder / ABOUT).is_file() and not (folder / CONFIG).exists() and not any(folder.glob("*.pt"))


def write_about_run(folder: Path, about: AboutRun) -> None:
    """Write `run.json` atomically; raise OutputError if that fails, and keep the old one."""
    with written_whole(folder / ABOUT) as temporary:
        temporary.write_text(encode_json(about), encoding="utf-8")


def about_run(folder: Path) -> AboutRun | None:
    """Read `run.json`; None if the folder is not a run."""
    try:
        return decode_json(AboutRun, (folder / ABOUT).read_bytes(), str(folder / ABOUT))
    except (OSError, PmmError):
        return None


def resolve_checkpoint(path: Path | None) -> Path:
    """A file as given, `best.pt` of a run folder, or of the newest run for None; raise ModelError if it is missing."""
    if path is None:
        if not (found := _runs()):
            problem = f"no run with a {BEST} in {RUNS.resolve()}"
            raise ModelError(problem, "Run pmm train first, or name a run folder or a checkpoint")
        return found[0] / BEST
    file = path / BEST if path.is_dir() else path
    if not file.is_file():
        problem = f"{path} is a folder without {BEST}" if path.is_dir() else f"{path} does not exist"
        remedy = "Name a run folder, a checkpoint or a model file"
        if (path / LAST).is_file():  # interrupted before the first evaluation
            remedy = f"Continue the run with pmm train --resume {shlex.quote(str(path))}, or name its {LAST}"
        raise ModelError(problem, remedy)
    return file


def _runs() -> list[Path]:
    """The folders in `runs/` that hold a best.pt and the one that `ELSEWHERE` names, those started last first."""
    folders = sorted(best.parent for best in RUNS.glob(f"*/{BEST}"))
    with suppress(OSError):
        folders.append(Path(os.fsdecode(ELSEWHERE.read_bytes())))

    def started(folder: Path) -> tuple[str, float]:
        return getattr(about_run(folder), "started", ""), (folder / BEST).stat().st_mtime

    return sorted((folder for folder in folders if (folder / BEST).is_file()), key=started, reverse=True)


def find_checkpoint(
    model: Path, digest: str | None, digests: Callable[[Path], Iterable[str | None]] = lambda file: [sha256(file)]
) -> Path | None:
    """The checkpoint with this SHA-256 in the run or the folder of a model or in `runs/`; None if it is not there.

    It may be one that was reduced from such a checkpoint. Without a SHA-256 it is best.pt of the model's run.
    `digests` returns the SHA-256 by which a file may be known.
    """
    run = run_of(model)
    if digest is None:
        return run and run / BEST
    folders = dict.fromkeys([*([run] if run else []), model.parent, *_runs()])
    places = [place for folder in folders for place in (folder, *sorted(folder.glob(f"{REDUCED}*")))]
    files = (file for place in places for file in sorted(place.glob("*.pt")) if file.is_file())
    return next((file for file in files if digest in digests(file)), None)


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint or an export lies in, or None."""
    places = (*file.absolute().parents[:2], *file.resolve().parents[:2])  # as given, or where a link leads
    return next((folder for folder in places if about_run(folder)), None)


def data_of(model: Path, data: Path | None = None, layout: str | None = None) -> tuple[Path, str | None]:
    """The data set and layout to use with a model: those given, otherwise those of the model's run.

    Raises ModelError or DataError if no data set is given and the model does not exist or does not belong to a run.
    """
    run = run_of(model)
    about = about_run(run) if run else None
    if about is None and data is not None:
        return data, layout
    if about is None and not model.exists():
        raise ModelError(f"{model} does not exist", "Name a checkpoint or a model that pmm export wrote")
    if about is None:
        raise DataError(f"{model} is not in a run folder, so its data set is unknown", "Name one with --data")
    of_run = Path(about.data)
    another = data is not None and data.resolve() != of_run.resolve()
    return data or of_run, layout or (None if another else about.layout)
