"""Small stand-ins that tests of several parts share: a network, and a data set on disk."""

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from pmm_edge.cli import main
from pmm_edge.export import ExportedFile, export
from pmm_edge.spec import InputSpec, ModelSpec

try:
    import torch
except ModuleNotFoundError:  # in tests/lowest_versions.sh
    torch = None

HEIGHT, WIDTH = 96, 64


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Identical bits need sums in identical order; threads of networks this small also only wait for each other."""
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch is None:
        pytest.skip("needs torch")
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "best.pt")


def write_tiny_checkpoint(path: Path) -> Path:
    """A ResNet-18 PMM of 96×64 whose batch norms are not identities, so that folding them matters."""
    from torch import nn

    from pmm_edge.model import Checkpoint, build_model, save_checkpoint

    generator = torch.manual_seed(0)
    network = build_model("pmm", num_classes=4, backbone="resnet18", height=HEIGHT, width=WIDTH)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.2, generator=generator)
    spec = ModelSpec("pmm", "resnet18", 4, InputSpec(HEIGHT, WIDTH), 1536, network.stages, network.mix_blocks)
    save_checkpoint(path, Checkpoint(spec, network.state_dict()))
    return path


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four people, three cameras, 12 JPEG files in each split, in Market-1501's layout: one color per person."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    random = np.random.default_rng(0)
    for folder, first_pid in (("bounding_box_train", 1), ("query", 101), ("bounding_box_test", 101)):
        (root / folder).mkdir(parents=True)
        draw_people(root / folder, range(first_pid, first_pid + 4), (128, 64), random)
    return root


def draw_people(folder: Path, pids: range, size: tuple[int, int], random: np.random.Generator) -> None:
    """Write an image of each person from each of three cameras."""
    for pid in pids:
        color = np.random.default_rng(pid).integers(0, 256, 3)
        for camera in (1, 2, 3):
            noisy = color + random.normal(0, 30, (*size, 3)) + 10 * camera
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{pid:04d}_c{camera}s1_{len(folder.name):06d}_00.jpg")


@pytest.fixture(scope="session")
def crowd(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set with 20 people in query and gallery, enough for a threshold at a false-match rate of 0.01."""
    root = shutil.copytree(tiny_dataset, tmp_path_factory.mktemp("data") / "crowd")
    random = np.random.default_rng(1)
    for folder in ("query", "bounding_box_test"):
        draw_people(root / folder, range(201, 217), (64, 32), random)
    return root


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportedFile:
    """The tiny network, exported with the input form uint8."""
    return export(tiny_checkpoint, out=tmp_path_factory.mktemp("export") / "model.onnx").files[0]


@pytest.fixture(scope="session")
def tiny_onnx(request: pytest.FixtureRequest) -> Path:
    ready = os.environ.get("PMM_TINY_ONNX")  # written where torch is installed
    return Path(ready) if ready else request.getfixturevalue("tiny_export").path


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user ID without an entry in the user database, as containers often have."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "PMM_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


class Outcome(NamedTuple):
    """What a command did."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> "Outcome":
        assert self.exit_code == 0, self.stderr
        return self

    @property
    def json(self) -> Any:
        return json.loads(self.ok.stdout)

    @property
    def error(self) -> str:
        """The error message of a command that was used wrongly and printed no result."""
        assert (self.exit_code, self.stdout) == (2, ""), self.stderr
        *_, last = self.stderr.strip().splitlines()
        assert last.startswith("error: ")
        assert "Traceback" not in self.stderr
        return last


@pytest.fixture
def pmm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run `pmm` with arguments, as the console script does."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["pmm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Outcome(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def pmm_without() -> Callable[..., Outcome]:
    """Run `pmm` in a new process in which some modules cannot be imported."""

    def run(absent: str, *arguments: object) -> Outcome:
        script = f"import sys; sys.modules.update(dict.fromkeys({absent.split()}))\n"
        script += "from pmm_edge.cli import main; main()"
        command = [sys.executable, "-c", script, *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many graphs a compiler of NVIDIA has compiled; with xdist, properties of reports reach this process."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    compiled = [value for report in reports for name, value in report.user_properties if name == "compiled"]
    for compiler, count in Counter(compiled).items():
        terminalreporter.write_line(f"{count} graphs compiled with {compiler}")
