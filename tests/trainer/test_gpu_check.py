"""The GPU check: its processes and limits with stages that take no time, and each stage on the CPU with small sizes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_training  # noqa: F401  registers the network
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAGES = f"""
import json, os, sys, time, types
sys.path.insert(0, {str(BENCHMARKS)!r})

def run_stage(letter, work, options):
    what = os.environ[letter]
    figure = {{"table": "t", "row": what, "figure": "x, ms", "value": 1.5}}
    found = {{"figures": [figure], "skipped": [], "facts": {{}}}}
    found["errors"] = ["part: it failed"] if "error" in what else []
    found["part"] = "inner" if what == "hang" else None
    if what == "skip":
        found |= {{"figures": [], "skipped": ["everything: no GPU"]}}
    (work / f"{{letter}}.json").write_text(json.dumps(found))
    if what == "wheel":
        import only_in_a_wheel
    if "crash" in what:
        print("the last words", file=sys.stderr)
        os._exit(7)
    if what == "hang":
        if not os.fork():
            (work.parent / "grandchild").write_text(str(os.getpid()))
        time.sleep(600)

sys.modules["gpu_stages"] = types.SimpleNamespace(run_stage=run_stage)
import gpu_check
for letter in gpu_check.STAGES:
    gpu_check.STAGES[letter] = gpu_check.Stage("title", 1 if letter == "c" else 100, ())
gpu_check.main()
"""


@pytest.fixture
def command(tmp_path):
    """Run the check with stages that do as the environment says; its temporary folder is `tmp_path`."""
    (tmp_path / "check.py").write_text(STAGES)

    def start(*options, **stages):
        arguments = [sys.executable, tmp_path / "check.py", "--output", tmp_path / "out", "--stages", "".join(stages)]
        environment = {**os.environ, **stages, "TMPDIR": str(tmp_path)}
        return subprocess.Popen([*map(str, arguments), *options], env=environment, stdout=subprocess.DEVNULL)

    return start


def report_in(folder):
    return json.loads((folder / "out" / "gpu_check.json").read_text())["stages"]


def alive(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def test_stages_that_fail_crash_or_hang_do_not_stop_the_others(command, tmp_path):
    assert command("--limit=600", a="error", b="crash", c="hang", d="skip", f="ok", g="error, crash").wait() == 1
    found = report_in(tmp_path)
    expected = {"a": "failed", "b": "failed", "c": "timeout", "d": "skipped", "f": "ok", "g": "failed"}
    assert {letter: one["status"] for letter, one in found.items()} == expected
    assert found["a"]["errors"] == found["g"]["errors"] == ["part: it failed"]
    assert found["b"]["errors"] == ["exit code 7: the last words"]
    assert found["c"]["figures"][0]["value"] == 1.5, "what a stage found before its limit is kept"
    assert found["c"]["limit"] == 2 and 1.9 < found["c"]["seconds"] < 20
    assert [text.partition(" ")[0] for text in found["c"]["skipped"]] == ["inner"], "the part that was stopped"
    assert not list(tmp_path.glob("gpu_check-*")), "the temporary folder"
    assert command("--limit=1", c="hang").wait() == 1
    page = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "| | x, ms |" in page and "| hang | 1.5 |" in page and "- skipped: everything: no GPU" in page


def test_what_a_killed_check_has_found_is_kept_and_later_stages_are_added(command, tmp_path):
    assert command(a="ok").wait() == 0
    killed = command(c="hang")
    wait_for((tmp_path / "out" / "gpu_check.json").exists)
    wait_for(lambda: report_in(tmp_path).get("c", {}).get("figures"))
    killed.kill()
    killed.wait()
    assert {letter: one["status"] for letter, one in report_in(tmp_path).items()} == {"a": "ok", "c": "running"}
    os.kill(int((tmp_path / "grandchild").read_text()), signal.SIGKILL)
    assert command(c="ok", d="ok").wait() == 0
    assert {letter: one["status"] for letter, one in report_in(tmp_path).items()} == dict.fromkeys("acd", "ok")


def test_wheels_are_there_for_the_stages_only(command, tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "only_in_a_wheel-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("only_in_a_wheel.py", "")
        wheel.writestr("only_in_a_wheel-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(
            "only_in_a_wheel-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: only_in_a_wheel\nVersion: 1\n"
        )
        wheel.writestr("only_in_a_wheel-1.dist-info/RECORD", "")
    assert command("--wheels", str(tmp_path / "wheels"), a="wheel").wait() == 0
    assert command(a="wheel").wait() == 1
    assert command("--wheels", str(tmp_path / "empty"), a="wheel").wait() == command("--limit=0", a="ok").wait() == 2


def test_an_interrupt_ends_all_processes(command, tmp_path):
    process = command(c="hang", d="ok")
    wait_for((tmp_path / "grandchild").exists)
    wait_for(lambda: (tmp_path / "grandchild").read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert {letter: one["status"] for letter, one in report_in(tmp_path).items()} == {"c": "interrupted"}
    wait_for(lambda: not alive((tmp_path / "grandchild").read_text()))


def test_a_stage_of_the_real_check_runs_in_a_process_of_its_own(tmp_path):
    """Without TensorRT, stage e finds nothing but the reason."""
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--small", "--stages", "e", "--output", tmp_path / "out"]
    script = "import sys; sys.modules['tensorrt'] = None"
    (tmp_path / "sitecustomize.py").write_text(script)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode == 0
    (stage,) = report_in(tmp_path).values()
    assert (stage["status"], stage["small"], len(stage["skipped"]), stage["errors"]) == ("skipped", True, 1, [])
    assert stage["skipped"][0].startswith("TensorRT: ")


@pytest.fixture
def stages(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    import gpu_stages
    import train_step

    monkeypatch.setitem(train_step.PRODUCT_SIDES, "cpu", 64)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: None)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    return gpu_stages


@pytest.fixture
def run(stages, tmp_path):
    """Run a stage in this process; return its figures by table, row and name."""

    def run(letter, method_epochs=1, seconds=60, **other):
        sizes = {**vars(stages.SMALL), "step": Namespace(backbone="tiny", height=96, width=32, batch=8), "rows": "PMM"}
        sizes["methods"] = stages.SMALL.methods | {"backbone": "tiny"}
        check = stages.Check(letter, tmp_path, Namespace(**{**sizes, **other}), seconds, method_epochs)
        stages.RUN[letter](check)
        assert json.loads((tmp_path / f"{letter}.json").read_text())["errors"] == check.found["errors"], "saved"
        figures = {}
        for one in check.found["figures"]:
            table = figures.setdefault(one["table"].partition(",")[0], {})
            table.setdefault(one["row"], {})[one["figure"]] = one["value"]
        return figures, check.found

    return run


def test_the_plan_names_stages_and_what_is_missing(stages, monkeypatch, capsys, tmp_path):
    import gpu_check

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "tensorrt" else name)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    lines = capsys.readouterr().out.splitlines()
    limits = {line[0]: float(line.split()[1]) for line in lines if line[1:3] == "  "}
    assert ended.value.code == 0 and limits.keys() == gpu_check.STAGES.keys()
    assert sum(limits.values()) == pytest.approx(600, abs=4)
    assert [line[0] for line in lines if line.endswith("missing: tensorrt")] == ["e"]
    assert limits["e"] / limits["g"] == pytest.approx(20 / 35, abs=0.03), "it only says what is missing"
    assert not list(tmp_path.iterdir())


def test_training_and_inference_of_the_trained_network(run):
    figures, found = run("c")
    assert not found["errors"]
    floor = figures["Floor of a step"]["FP32"]
    assert floor["operations, GFLOP"] > 0.1
    assert 0 < floor["bytes of products and Adam, GB"] < floor["bytes of all operators, GB"]
    steps = figures["Training step"]
    assert steps.keys() >= {"bf16", "FP32", "bf16, without CUDA graph", "bf16, --compile", "FP32, textbook Grad-CAM"}
    least = max(value for name, value in floor.items() if name.startswith("floor by"))
    assert steps["FP32"]["times the floor"] == pytest.approx(steps["FP32"]["step, ms"] / least)
    goals, floor, step = figures["Goals on an H100"], figures["Floor of a step"]["bf16"], steps["bf16"]["step, ms"]
    for what, base in (
        ("floor by operations", "floor by operations, ms"),
        ("bytes of all operators", "their time, ms"),
    ):
        row = goals[f"step in bf16, times the {what}"]
        assert row["measured"] == pytest.approx(step / floor[base]) and row["goal"] == "at most 1.5"
        assert row["met"] == ("yes" if step <= 1.5 * floor[base] else "no")
    assert goals["400 epochs in bf16, min"]["met"] == "yes"
    compiled = goals["--compile, times as fast as without"]
    assert compiled["met"] == ("yes" if compiled["measured"] >= 1.2 else "no") and compiled["goal"] == "at least 1.2"
    epochs = figures["pmm train --preset market1501"]["bf16"]
    assert epochs["400 epochs, min"] == pytest.approx(400 * epochs["epoch, s"] / 60)
    assert epochs["epochs"] == 3 and 0 <= epochs["waiting for data, %"] < 100 and epochs["mAP, %"] > 0

    figures, found = run("d")
    assert not found["errors"] and not found["skipped"], "ONNX Runtime works on the CPU, and stage c has trained"
    parity = figures["Parity with the checkpoint in PyTorch FP32"]
    assert [row["gates"] for row in parity.values()] == ["passed"] * 3
    assert parity["ONNX Runtime FP32"]["smallest cosine"] > 0.9999
    assert len(figures["Latency"]) == 6 and all(row["median, ms"] > 0 for row in figures["Latency"].values())


def test_the_energy_counter_is_read_around_steps_and_inference(run, stages, monkeypatch, tiny_checkpoint):
    import train_step

    from pmm_edge.bench import resources

    class Gpu:
        joules = property(lambda self: time.perf_counter() * 50)

    monkeypatch.setattr(stages, "_checkpoint", lambda check: (tiny_checkpoint, tiny_checkpoint))
    _, found = run("g")
    assert found["skipped"] and not found["figures"], "no counter on a CPU"
    monkeypatch.setattr(resources, "open_gpu", lambda device: Gpu())
    figures, found = run("g", step=Namespace(backbone="tiny", height=96, width=64, batch=8))
    rows = figures["Energy (NVML)"]
    assert not found["errors"] and len(rows) == 2
    assert all(row["W"] == pytest.approx(50, rel=0.1) and row["mJ per image"] > 0 for row in rows.values())
    monkeypatch.setattr(train_step, "seconds", lambda step, device, count=1: time.sleep(0.02 * count))
    figures, _ = run("g", steps=3)
    trained = figures["Energy (NVML)"]["training step in bf16, batch 8"]
    assert trained["mJ per image"] == pytest.approx(1000 * 50 * 0.02 / 8, rel=0.2)


def test_the_methods_are_trained_one_after_the_other(run):
    figures, found = run("f", rows="PMM,none", seeds=(0, 1))
    assert not found["errors"] and "status" not in found
    (rows,) = (table for name, table in figures.items() if name.startswith("Methods on"))
    each = figures["Each training"]
    assert list(each) == ["PMM, seed 0", "none, seed 0", "PMM, seed 1", "none, seed 1"]
    assert all(row["s"] > 0 for row in each.values())
    for name, row in rows.items():
        average, _, deviation = row["mAP, %"].partition(" ± ")
        first, second = (each[f"{name}, seed {seed}"]["mAP, %"] for seed in (0, 1))
        assert row["seeds"] == 2 and float(average) == pytest.approx((first + second) / 2, abs=0.06)
        assert float(deviation) == pytest.approx(abs(first - second) / 2**0.5, abs=0.06)


def test_a_training_of_the_check_has_the_figures_of_pmm_train(run, stages, tmp_path):
    from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
    from pmm_edge.trainer.train import train

    figures, _ = run("f", rows="PMM", method_epochs=2)
    data = cached_synthetic(SyntheticConfig(**stages.SMALL.method_data))
    settings = stages.SMALL.methods | {"backbone": "tiny", "epochs": 2, "precision": "bf16", "device": "cpu"}
    best = train(data, out=tmp_path / "run", **settings, evaluate_every=2).best
    expected = {"Rank-1, %": 100 * best.rank1, "mAP, %": 100 * best.mAP, "mAP@50, %": 100 * best.mAP_at_50}
    row = figures["Each training"]["PMM, seed 0"]
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_trainings_that_do_not_finish_are_counted(run, stages, monkeypatch):
    import gpu_methods

    trained, ends = gpu_methods._train, iter([1e9, 1e9, 0.0])  # the third one has no time
    monkeypatch.setattr(gpu_methods, "_train", lambda *arguments: trained(*arguments[:-1], next(ends)))
    figures, found = run("f", rows="PMM,none", seeds=(0, 1))
    assert found["status"] == "timeout" and len(found["skipped"]) == 1
    (rows,) = (table for name, table in figures.items() if name.startswith("Methods on"))
    assert {name: row["seeds"] for name, row in rows.items()} == {"PMM": 1, "none": 1}, "a whole table of one seed"


def test_missing_modules_of_exports_are_named(run, monkeypatch):
    import gpu_check

    find = gpu_check.find_spec
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if "transformers" in name else find(name))
    figures, found = run("d")
    assert not figures and not found["errors"]
    assert len(found["skipped"]) == 1 and "onnxruntime.transformers" in found["skipped"][0]
    assert gpu_check.Stage("", 100, ("json.tool", "no_package.module")).missing == ["no_package.module"]


def test_gpu_tests_are_counted_by_outcome(run, stages, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q\nmarkers = gpu: a GPU\n")
    lines = ["import pytest", "pytestmark = pytest.mark.gpu", "@pytest.mark.parametrize('x', [1, 2])"]
    lines += [
        "def test_passes(x): pass",
        "def test_fails(): assert not 1",
        "def test_skips(): pytest.skip('no TensorRT')",
    ]
    (tmp_path / "tests" / "test_some.py").write_text("\n".join(lines))
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    figures, found = run("b")
    assert figures["pytest -m gpu"]["tests"] == {"passed": 2, "failed": 1, "error": 0, "skipped": 1}
    assert len(found["errors"]) == 1 and "test_fails" in found["errors"][0]
    assert len(found["skipped"]) == 1 and "no TensorRT" in found["skipped"][0]
    (tmp_path / "tests" / "test_some.py").write_text("\n".join([*lines[:2], lines[-1]]))
    figures, found = run("b")
    assert not figures and len(found["skipped"]) == 1, "so that the stage does not read as ok"
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --unknown\n")
    _, found = run("b")
    assert len(found["errors"]) == 1 and "exit code 4" in found["errors"][0]


def test_the_machine_is_described(run, monkeypatch):
    from pmm_edge import doctor

    monkeypatch.setattr(doctor, "isolated", lambda name: doctor.Finding(doctor.Status.OK, name))
    _, found = run("a")
    assert found["facts"].keys() >= {"processor", "packages", "doctor, TensorRT"}
    assert torch.__version__ in found["facts"]["packages"]


def test_a_gpu_is_described(run, monkeypatch):
    from pmm_edge import doctor
    from pmm_edge.bench import resources

    about = Namespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(resources, "open_gpu", lambda device: Namespace(driver="580.1", max_mhz=1980))
    monkeypatch.setattr(doctor, "examine", lambda: {"checks": {}})
    facts = run("a")[1]["facts"]
    assert facts["GPU"] == "NVIDIA H100, 80 GiB, compute capability 9.0, cuDNN 91300"
    assert facts["driver"] == "580.1, highest SM clock 1980 MHz"


def test_waits_and_memory_of_a_gpu_are_counted(stages, monkeypatch):
    modes, calls = [], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    texts = ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "another warning")
    assert stages._synchronizations(lambda: [warnings.warn(text, stacklevel=1) for text in texts]) == 2
    with pytest.raises(ZeroDivisionError):
        stages._synchronizations(lambda: 1 / 0)
    assert modes == ["warn", "default"] * 2
    assert stages._peak_memory() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 29)
    stages.reset_memory()
    assert calls == ["empty_cache", "reset_peak_memory_stats"] and stages._peak_memory() == 1.5


def test_without_a_gpu_only_the_machine_is_described(stages, monkeypatch, tmp_path):
    ran, alarms = [], []
    monkeypatch.setattr(stages.signal, "alarm", alarms.append)
    for letter in "ad":
        monkeypatch.setitem(
            stages.RUN, letter, lambda check: ran.append((check.letter, check.sizes, check.method_epochs))
        )
        options = Namespace(child=(letter, tmp_path, str(time.monotonic() + 60)), small=False, epochs=70)
        stages.run_stage(letter, tmp_path, options)
    assert ran == [("a", stages.FULL, 70)]
    assert json.loads((tmp_path / "d.json").read_text())["skipped"] == ["everything: PyTorch finds no GPU"]
    assert set(alarms) <= {69, 70}, "a process that nobody stops ends 10 s after its limit"


def test_an_error_in_a_part_leaves_the_rest(stages, tmp_path):
    check = stages.Check("c", tmp_path, stages.SMALL, 60, 1)
    with check.part("whole"):
        with check.part("first"):
            assert json.loads((tmp_path / "c.json").read_text())["part"] == "first"
            raise ValueError("it failed\nfor a long reason")
        assert check.found["part"] == "whole"
    assert check.found["errors"] == ["first: ValueError: it failed"] and check.found["part"] is None


@pytest.mark.parametrize(
    ("compiled", "seconds", "reason"), [(0.5, 60, ""), (1.0, 60, "1.00"), (0.5, 0, "0 s are left")]
)
def test_compiled_epochs_need_a_faster_step_and_time(compiled, seconds, reason, run, stages, monkeypatch):
    import train_step

    def step_of(network, options, device, dtype, **choice):
        return Namespace(seconds=compiled if choice.get("compiled") else 1.0)

    trained = []
    monkeypatch.setattr(train_step, "step_of", step_of)
    monkeypatch.setattr(train_step, "seconds", lambda step, device, count=1: getattr(step, "seconds", 1.0))
    monkeypatch.setattr(stages, "_train_epochs", lambda check, name, compiled: trained.append((name, compiled)))
    figures, found = run("c", seconds=seconds)
    assert not found["errors"]
    floor = figures["Floor of a step"]["bf16"]
    assert floor["matrix product, TFLOP/s"] == pytest.approx(2 * 64**3 / 1e12), "multiplications and additions in 1 s"
    assert floor["copy, GB/s"] == pytest.approx(2 * 2**26 / 1e9), "read and written in 1 s"
    goal = figures["Goals on an H100"]["--compile, times as fast as without"]
    assert goal == {"measured": 1 / compiled, "goal": "at least 1.2", "met": "no" if compiled == 1 else "yes"}
    assert trained == [("bf16", False), *[("bf16, --compile", True)] * (not reason)]
    assert [reason in text for text in found["skipped"]] == [True] * bool(reason)


def test_a_network_is_drawn_if_none_was_trained_and_only_what_runs_is_compared(run, stages, monkeypatch, tmp_path):
    from pmm_edge.errors import PmmError
    from pmm_edge.runtime import onnx_backend

    def refused(*_):
        raise PmmError("no CUDA", "")

    compared = []
    monkeypatch.setattr(stages, "_export", lambda check, checkpoint, data, precision: checkpoint.with_suffix(".onnx"))
    monkeypatch.setattr(stages, "_compare", lambda check, models, *others: compared.append((models, *others)))
    monkeypatch.setattr(onnx_backend, "open_session", refused)
    _, found = run("d")
    (models, checkpoint, data, device) = compared[0]
    assert list(models) == ["exported weights in PyTorch"] and device == "cpu"
    assert checkpoint.is_file() and (data / "bounding_box_train").is_dir()
    assert [text.partition(":")[0] for text in found["skipped"]] == ["a trained network", "ONNX Runtime CUDA"]


def test_a_model_that_fails_its_gates_fails_the_stage(stages, monkeypatch, tiny_checkpoint, tiny_dataset, tmp_path):
    import pmm_edge.bench as bench

    failure = Namespace(kind=Namespace(value="cosine"), detail="0.5, at least 0.9")
    model = Namespace(parity=None, retrieval=None, retrieval_change=None, failures=[failure])
    monkeypatch.setattr(bench, "bench", lambda *_, **__: Namespace(report=Namespace(models=[model], images=3)))
    check = stages.Check("d", tmp_path, Namespace(**{**vars(stages.SMALL), "batches": ()}), 60, 1)
    stages._compare(check, {"export": Path("export.safetensors")}, tiny_checkpoint, tiny_dataset, "cpu")
    assert check.found["errors"] == ["parity of export: cosine 0.5, at least 0.9"]
    assert check.found["figures"][0]["value"] == "failed"
