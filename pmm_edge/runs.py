"""Run folders: what one training made and what was exported from it, found again without naming it.

runs/20261122-174200-quick/
run.json  run.lock  config.toml  log.txt  metrics.jsonl  tensorboard/
last.pt  best.pt
export/model.onnx
bench.json
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from pmm_edge.errors import DataError, ModelError, OutputError
from pmm_edge.files import written_whole

RUNS = Path("runs")
CONFIG = "config.toml"
BEST = "best.pt"
LAST = "last.pt"
EXPORT_FOLDER = "export"
ABOUT = "run.json"


@dataclass(frozen=True)
class AboutRun:
    """What later commands ask of a run."""

    name: str
    data: str
    """The data set's folder, absolute."""
    version: str
    """Of pmm-edge."""
    layout: str | None = None
    """The layout that was named for the data set, where one was."""

    def to_json(self) -> str:
        """The text of `run.json`."""
        return json.dumps(asdict(self), indent=2) + "\n"


def new_run_path(name: str) -> Path:
    """Where a run goes that is not told where: `runs/<time>-<name>/`."""
    return RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


def new_run_folder(about: AboutRun, folder: Path) -> Path:
    """Make a run's folder, or take one whose run never began.

    Raises:
        OutputError: it cannot be made, or is another run's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if never_began(folder):
            (folder / ABOUT).write_text(about.to_json(), encoding="utf-8")
            return folder
        with (folder / ABOUT).open("x", encoding="utf-8") as file:
            file.write(about.to_json())
    except FileExistsError as error:
        raise OutputError(
            f"{folder} is taken by another run or file", "Go on with that run with --resume, or choose another --out"
        ) from error
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}", "Choose another folder with --out") from error
    return folder


def never_began(folder: Path) -> bool:
    """Whether a run was killed between its first file and its second: it has no settings and learned nothing."""
    return (folder / ABOUT).is_file() and not (folder / CONFIG).exists() and not any(folder.glob("*.pt"))


def write_about_run(folder: Path, about: AboutRun) -> None:
    """Write anew what a run says of itself.

    Raises:
        OutputError: the file cannot be written; the one before it is still there.
    """
    with written_whole(folder / ABOUT) as temporary:
        temporary.write_text(about.to_json(), encoding="utf-8")


def about_run(folder: Path) -> AboutRun | None:
    """What a run says of itself; None where the folder is no run."""
    try:
        return AboutRun(**json.loads((folder / ABOUT).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def newest_run() -> Path:
    """The run with the newest best checkpoint.

    Raises:
        ModelError: there is none.
    """
    found = sorted(RUNS.glob(f"*/{BEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(f"no run with a {BEST} in {RUNS.resolve()}", "Run pmm train first, or name a checkpoint")
    return found[-1].parent


def run_of(file: Path) -> Path | None:
    """The run folder that a checkpoint or an export lies in, or None."""
    return next((folder for folder in file.resolve().parents[:2] if about_run(folder)), None)


def data_of(model: Path, data: Path | None = None, layout: str | None = None) -> tuple[Path, str | None]:
    """The data set to use with a model, and the layout to read it in where it was named: by default those of its run.

    Raises:
        ModelError: no data set is named, and there is no such model.
        DataError: no data set is named, and the model lies in no run.
    """
    run = run_of(model)
    about = about_run(run) if run else None
    if about is None:
        if data is None and not model.exists():
            raise ModelError(f"{model} does not exist", "Name a checkpoint, or a file of pmm export")
        if data is None:
            raise DataError(f"{model} does not say which data set it belongs to", "Name one with --data")
        return data, layout
    of_run = Path(about.data)
    named_otherwise = data is not None and data.resolve() != of_run.resolve()
    return data or of_run, layout or (None if named_otherwise else about.layout)
