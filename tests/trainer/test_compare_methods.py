"""The comparison of methods as a user runs it: what it trains, what it reuses, what stops it."""

import importlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pmm_edge.files import sha256
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.runtime import load
from pmm_edge.trainer import train as train_file

SETTINGS = ("backbone=tiny", "height=48", "width=32", "mix_block_size=1x1", "batch=8", "erase_size=8", "device=cpu")


@pytest.fixture
def compare(monkeypatch, capsys, tiny_dataset, tmp_path):
    """Run the script in this process, whose signal handlers it changes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments, script="compare_methods"):
        flags = ["--dtype=fp32", "--epochs=1", "--seeds=0", *(f"--set={text}" for text in SETTINGS)]
        command = [script, tiny_dataset, "--out", tmp_path / "out", *flags, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(script).main()
        return ended.value.code, *capsys.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def trainings(monkeypatch):
    """Method, mix (or the teacher) and seed of each training."""
    seen, fit = [], train_file.fit

    def recorded(run):
        seen.append((run.config.method, run.config.teacher or run.config.mix, run.config.seed))
        return fit(run)

    monkeypatch.setattr(train_file, "fit", recorded)
    return seen


def rows(printed):
    """Cells of all rows of the printed tables."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]


def test_a_row_of_both_tables_is_trained_once_and_reused(compare, trainings, tmp_path):
    code, printed, _ = compare("--methods", "pmm,A-Hard-Mix")
    assert code == 0 and trainings == [("pmm", "a-hard-mix", 0)]
    shown = rows(printed)
    assert [row[0] for row in shown] == ["PMM", "A-Hard-Mix"], "only what was trained"
    assert compare("--methods", "PMM,none")[0] == 0
    assert trainings[1:] == [("pmm", "none", 0)]
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    assert len(results) == 2 and all(result["epochs"] == 1 for result in results)
    figures = [[f"{100 * result[name]:.1f}" for name in ("Rank-1", "mAP", "mAP@50")] for result in results]
    assert shown[0][1:] in [["1", rank1, "94.1", *rest, "85.2"] for rank1, *rest in figures], "and the paper's figures"


def test_a_student_is_compared_with_itself_without_a_teacher_and_with_its_teacher(
    compare, trainings, whole, tmp_path, monkeypatch
):
    import student

    exported, gflops = {}, {"baseline": 1.0, "pmm": 6.0}

    def loaded(onnx, device):  # exporting takes longer than all the rest
        embedder = load(exported[onnx], device)
        embedder.spec = replace(embedder.spec, gflops=gflops[embedder.spec.architecture], parameters=1)
        return embedder

    monkeypatch.setattr(student, "export", lambda checkpoint, out, **_: exported.update({out: checkpoint}))
    monkeypatch.setattr(student, "load", loaded)
    command = ["--teacher", whole.folder, "--json", tmp_path / "student.json", "--seeds", "0,1"]
    code, printed, _ = compare(*command, script="student")
    assert code == 0
    teacher = str(whole.folder / "best.pt")
    assert trainings == [("baseline", mix, seed) for seed in (0, 1) for mix in ("a-hard-mix", teacher)]
    result = json.loads((tmp_path / "student.json").read_text())
    without, taught, of_teacher = result["sides"].values()
    (figures,) = of_teacher["figures"]
    assert figures["mAP"] == pytest.approx(whole.best.mAP)
    gains = [one["mAP"] - other["mAP"] for one, other in zip(taught["figures"], without["figures"], strict=True)]
    assert result["gains"] == pytest.approx(gains)
    assert result["work"] == pytest.approx(1 / 6)
    assert result["loss"] == pytest.approx(whole.best.mAP - sum(one["mAP"] for one in taught["figures"]) / 2)
    assert [row[0] for row in rows(printed)] == [*result["sides"]]
    assert all(side["median_ms"].keys() == {"1", "8"} for side in result["sides"].values())
    assert len(trainings) == 4 and compare(*command, script="student")[0] == 0
    calibrated = load_checkpoint(whole.folder / "best.pt")
    spec = replace(calibrated.spec, checkpoint_sha256=sha256(whole.folder / "best.pt"), dataset="other")
    save_checkpoint(tmp_path / "best.pt", replace(calibrated, spec=spec))
    assert compare(*command, "--teacher", tmp_path / "best.pt", script="student")[0] == 0
    assert len(trainings) == 4, "they are reused, also if the teacher was calibrated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "PMN"], "Did you mean 'pmm'"),
        (["--set", "epoch=3"], "Did you mean 'epochs'"),
        (["--set", "teacher=best.pt"], "benchmarks/student.py --teacher"),
        (["--set", "erase_size=0", "--methods", "PMM,CutOut"], "--erase-size"),
        (["--layout", "market1502", "--methods", "PMM"], "Did you mean 'market1501'?"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_trained(compare, tmp_path, arguments, message):
    code, printed, errors = compare(*arguments)
    assert (code, printed, errors.count("\n")) == (2, "", 1) and message in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing.pt", "damaged.pt", "weights.safetensors"])
def test_a_wrong_teacher_is_refused_before_anything_is_trained(compare, tmp_path, name):
    if name != "missing.pt":
        (tmp_path / name).write_text("no network")
    code, _, errors = compare("--teacher", tmp_path / name, script="student")
    assert code == 2 and name in errors
    assert not (tmp_path / "out").exists()
