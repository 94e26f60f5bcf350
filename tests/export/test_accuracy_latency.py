"""The benchmark that draws mAP against latency: what it measures, groups, reuses and refuses."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pmm_edge.bench.evaluation import evaluate_model
from pmm_edge.errors import CheckFailedError
from pmm_edge.export import export
from pmm_edge.model import Checkpoint, build_model, save_checkpoint
from pmm_edge.runs import CONFIG, AboutRun, write_about_run
from pmm_edge.spec import InputSpec, ModelSpec, Reduction, RetrievalFigures
from pmm_edge.trainer.config import TrainConfig

SETTINGS = TrainConfig(method="baseline", backbone="resnet10", height=64, width=32, erase_size=8)
SPEC = ModelSpec("baseline", "resnet10", 4, InputSpec(64, 32), 512, {"I": (0, 512)})


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import accuracy_latency

    def export_int8_once(*arguments, precision, **options):
        method = {"calibration_method": "minmax"} if precision == "int8" else {}
        return export(*arguments, precision=precision, **options, **method)

    quick = partial(accuracy_latency.measure_latency, min_runs=2, min_seconds=0)
    monkeypatch.setattr(accuracy_latency, "measure_latency", quick)
    monkeypatch.setattr(accuracy_latency, "export", export_int8_once)
    return accuracy_latency


@pytest.fixture
def run(script, monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["accuracy_latency.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        return ended.value.code, *capsys.readouterr()

    return call


def write_run(folder: Path, data: Path, seed: int = 0) -> Path:
    """A run folder with an untrained network."""
    network = build_model("baseline", num_classes=4, backbone="resnet10", height=64, width=32)
    write_about_run(folder, AboutRun(folder.name, str(data), "0"))
    (folder / CONFIG).write_text(replace(SETTINGS, seed=seed).to_toml())
    save_checkpoint(folder / "best.pt", Checkpoint(SPEC, network.state_dict()))
    return folder


def test_two_seeds_are_one_model(run, script, people, tmp_path, monkeypatch):
    runs = [write_run(tmp_path / "runs" / f"seed-{seed}", people, seed) for seed in (0, 1)]
    shutil.copy(runs[0] / "best.pt", runs[1])  # exported once
    options = ["--batch", "1,2", "--cache", tmp_path / "cache", "--json", "figures.json"]
    code, printed, errors = run(tmp_path / "runs", *options)
    assert code == 0, errors
    figures = json.loads((tmp_path / "figures.json").read_text())
    (model,) = figures["models"]
    assert (model["name"], model["runs"], model["embedding_size"]) == ("baseline", ["seed-0", "seed-1"], 512)
    for precision in ("fp32", "int8"):
        found = model["exports"][precision]
        (path,) = (tmp_path / "cache").glob(f"*/{precision}-*.onnx")
        expected = evaluate_model(path, [people], device="cpu")[0].results["plain"]
        assert (found["mAP"], found["rank1"]) == ([expected.mAP] * 2, [expected.rank(1)] * 2)
        assert all(found["median_ms"][batch] > 0 <= found["variation"][batch] for batch in ("1", "2"))
        assert script.mean_and_deviation(found["mAP"]) in printed
    assert script.load(path, "cpu").spec.gflops == model["gflops"]
    with Image.open(tmp_path / "accuracy-latency.png") as picture:
        assert picture.width > 1000

    def failing(*arguments, **options):
        raise CheckFailedError("it differs")

    monkeypatch.setattr(script, "embed_dataset", None)  # exports and evaluations are reused
    monkeypatch.setattr(script, "export", failing)
    for path in (tmp_path / "cache").rglob("int8-*.onnx"):
        path.unlink()
    code, printed, errors = run(*runs, *options)
    assert code == 1 and errors.count("it differs") == 2 and "baseline" in printed
    (model,) = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert list(model["exports"]) == ["fp32"], "what failed is left out"

    redrawn = run("--draw", "figures.json", "--picture", "again.svg")
    assert redrawn[:2] == (0, printed.replace("accuracy-latency.png", "again.svg"))
    assert (tmp_path / "again.svg").stat().st_size


def test_wrong_use(run, people, tiny_dataset, tmp_path):
    ours, theirs = write_run(tmp_path / "ours", people), write_run(tmp_path / "theirs", tiny_dataset)
    (tmp_path / "damaged.json").write_text("{}")
    for arguments in (
        [],
        [ours, "--draw", "damaged.json"],
        [ours, "--batch", "0"],
        [ours, "--picture", "figure.txt"],
        [tmp_path / "absent"],
        [people],  # a folder without a run
        [ours, theirs],  # of different data sets
        ["--draw", "absent.json"],
        ["--draw", "damaged.json"],
    ):
        code, printed, errors = run(*arguments)
        assert (code, printed) == (2, "") and "Traceback" not in errors, arguments
    assert str(theirs / "best.pt") in run(ours, theirs)[2]


def test_names_say_what_differs(script, monkeypatch, tmp_path):
    larger = replace(SPEC, backbone="resnet18")
    specs = {
        "a": SPEC,
        "b": replace(SPEC, architecture="pcb", rpp=True),
        "c": replace(SPEC, architecture="pmm", mix="cutout"),
    }
    monkeypatch.setattr(script, "load_checkpoint", lambda file: Checkpoint(specs[file.parent.name], {}))

    def names():
        return list(script.seeds_by_name([Path(folder, "best.pt") for folder in specs]))

    assert names() == ["baseline", "PCB+RPP", "PMM (cutout)"]
    specs = {"a": SPEC, "b": larger, "c": replace(larger, embedding_size=256)}
    assert names() == ["baseline resnet10 512-d", "baseline resnet18 512-d", "baseline resnet18 256-d"]
    specs = {"a": SPEC, "b": SPEC}
    assert names() == ["baseline 512-d a", "baseline 512-d b"]

    # Of one run, and of two runs that differ only in the teacher:
    for run in ("c", "d"):
        write_about_run(tmp_path / run, AboutRun(run, "", "0"))
        (tmp_path / run / CONFIG).write_text(SETTINGS.to_toml())
    figures = RetrievalFigures(0.5, 0.5, 0.5, 0.5)
    plain = Reduction(64 * "0", 512, {}, False, 12, "people", 64 * "0", 0.9, figures, figures, None, None)
    small, student = replace(SPEC, embedding_size=8, reduction=plain), replace(SPEC, teacher_sha256=64 * "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "load_checkpoint", lambda file: Checkpoint(specs[str(file.parent)], {}))
    whitened = replace(small, reduction=replace(plain, whitened=True))
    specs = {"c": SPEC, "c/reduced-8": small, "c/reduced-8-whitened": whitened}
    assert names() == ["baseline", "baseline PCA", "baseline PCA whitened"]
    specs = {"c": student, "d": replace(SPEC, teacher_sha256=64 * "2")}
    assert names() == ["baseline 512-d c", "baseline 512-d d"]
    specs = {"c": student, "d": student}
    assert names() == ["baseline"]
