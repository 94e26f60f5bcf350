"""Check everything on a machine with an NVIDIA GPU, in at most 10 minutes.

    python benchmarks/gpu_check.py                                all stages, into gpu_check/
    python benchmarks/gpu_check.py --stages abcd --limit 400 --wheels wheels/ --output FOLDER
    python benchmarks/gpu_check.py --dry-run                      what would run, and what is missing
    python benchmarks/gpu_check.py --small                        the same code on a CPU, with small sizes

Each stage runs in a process of its own with a time limit; time that a stage leaves goes to the later ones.
gpu_check.json and gpu_check.md in the output folder are written after each stage. Stages of an earlier run in the same
folder are kept unless they run again. The exit code is 1 if a stage failed or exceeded its limit.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130
REQUIRED = ("numpy", "PIL", "typer", "rich", "msgspec", "jinja2", "filelock", "pynvml", "onnxruntime", "torch")
TRAINING = ("torchvision", "safetensors", "tensorboard", "tomli_w")
EXPORT = ("torchvision", "safetensors", "onnx", "onnxscript")
FULL = Namespace(
    step=Namespace(backbone="resnet50", height=384, width=128, batch=64),
    batches=(1, 8, 32),
    runs=50,
    rounds=5,
    steps=10,  # taken before the device is waited for
    people=751,
    epochs=20,
    training={},
    rows="baseline,BDB,PMM,none,CutOut",
    seeds=(0, 1, 2),
    methods="backbone=resnet18 height=144 width=64 batch=64 images_per_identity=4 lr=1e-3 schedule=paper erase_size=16"
    " mix_block_size=3x1 mix_blocks=1",
    method_epochs=100,
    method_data={},
    energy_seconds=6.0,
)
SMALL = Namespace(
    step=Namespace(backbone="resnet10", height=96, width=32, batch=8),
    batches=(1, 2),
    runs=5,
    rounds=1,
    steps=1,
    people=8,
    epochs=3,
    training={"precision": "fp32", "erase_size": 16},
    rows="PMM,none",
    seeds=(0,),
    methods="backbone=resnet10 height=48 width=32 batch=8 mix_block_size=1x1",
    method_epochs=1,
    method_data={"train_identities": 8, "test_identities": 4, "cameras": 2},
    energy_seconds=0.2,
)


def write(path: Path, text: str) -> None:
    """Write a file atomically. (`pmm_edge` may come from --wheels and is not imported here.)"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class Check:
    """A stage in its process: what it has found so far is saved after every figure."""

    def __init__(self, stage: str, output: Path, seconds: float, small: bool, epochs: int | None = None) -> None:
        self.stage, self.small, self.sizes = stage, small, SMALL if small else FULL
        self.epochs = epochs or self.sizes.method_epochs
        self.device = "cpu" if small else "cuda:0"
        self.work = output / "work"
        self.deadline = time.monotonic() + seconds
        self.found: dict[str, Any] = {"figures": [], "skipped": [], "errors": [], "facts": {}}
        self.save()

    def save(self) -> None:
        write(self.work / f"{self.stage}.json", json.dumps(self.found))

    def add(self, table: str, row: str, **figures: float | int | str | None) -> None:
        """Record figures, named with their units: `step_ms` is the column "step, ms"."""
        for name, value in figures.items():
            if value is not None:
                self.found["figures"].append({"table": table, "row": row, "figure": name, "value": value})
        print(f"{table} | {row} | {figures}", flush=True)
        self.save()

    def skip(self, what: str, why: object) -> None:
        """Record what is left out, and why."""
        self.found["skipped"].append(f"{what}: {' '.join(str(why).split())}")
        self.save()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record an error in the block, so that the rest of the stage still runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or [""])[0]
            self.found["errors"].append(f"{name}: {type(error).__name__}: {reason}")
            self.save()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic()


# The stages. They import what they need, because wheels and libraries may be missing.


def describe_machine(check: Check) -> None:
    """What every other figure was measured on."""
    from importlib.metadata import distributions

    import torch

    from pmm_edge.bench.resources import machine_state, open_gpu
    from pmm_edge.doctor import examine
    from pmm_edge.machine import processor

    facts = check.found["facts"]
    state, gpu = machine_state(), open_gpu(check.device)
    facts["processor"] = f"{processor()}, {state.cores:g} usable cores, load of other processes {state.load}"
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        capability = f"compute capability {about.major}.{about.minor}"
        facts["GPU"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {capability}"
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    if gpu:
        facts["driver"] = f"{gpu.driver}, highest SM clock {gpu.max_mhz} MHz"
    facts["Python"], facts["torch"] = sys.version.split()[0], f"{torch.__version__}, CUDA {torch.version.cuda}"
    wanted = ("torchvision", "triton", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings")
    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in distributions()}
    facts["packages"] = ", ".join(f"{name} {installed[name]}" for name in wanted if name in installed)
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h of %cs"]
        facts["pmm-edge"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    check.save()
    for name, finding in examine()["checks"].items():
        facts[f"doctor: {name}"] = f"{finding.status.value}: {finding.detail}"


def run_gpu_tests(check: Check) -> None:
    """`pytest -m gpu`, in the files that have such tests."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider", "-rs", *map(str, files)]
    outcomes = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout
        for line in tests.stdout:
            print(line, end="", flush=True)
            words = line.split()
            if "::" in line and len(words) > 1 and words[1] in outcomes and not line.startswith(tuple(outcomes)):
                outcomes[words[1]] += 1
                check.found["figures"] = []
                check.add("pytest -m gpu", "tests", **{name.lower(): count for name, count in outcomes.items()})
            elif line.startswith("SKIPPED ["):
                check.skip("pytest", line.partition("] ")[2])
            elif line.startswith(("FAILED ", "ERROR ")) or (words and words[0] == "INTERNALERROR>"):
                check.found["errors"].append(line.strip())
    if tests.returncode not in (0, 5) and not check.found["errors"]:  # 5: all tests were deselected
        check.found["errors"].append(f"pytest ended with exit code {tests.returncode}")


def measure_training(check: Check) -> None:
    """The step in each precision, next to the textbook step and to floors; then epochs of `pmm train`."""
    import torch
    from train_step import PMM, PRODUCT_SIDES, TextbookPMM, matrix_product, operations_of, seconds, step_of, traffic_of

    from pmm_edge.trainer.step import PAPER_EPOCHS

    device, sizes, options = torch.device(check.device), check.sizes, check.sizes.step
    work = f"{options.backbone} {options.height}x{options.width}, batch {options.batch}"
    dtypes = {"FP32": torch.float32, "bf16": torch.bfloat16}
    floors: dict[str, float] = {}
    for name, dtype in dtypes.items():
        with check.part(f"floor in {name}"):
            # As in cuDNN's convolutions, whose default allows TF32.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
            product = matrix_product(device, dtype)
            seconds(product, device)
            rate = (
                2
                * PRODUCT_SIDES[device.type] ** 3
                / min(seconds(product, device, sizes.steps) for _ in range(sizes.rounds))
            )
            torch.backends.cuda.matmul.allow_tf32 = False
            bandwidth = _copy_bandwidth(device, sizes)
            operations, (least, separate) = operations_of(options), traffic_of(options, dtype)
            by_work, by_bytes = 1000 * operations / rate, 1000 * least / bandwidth
            floors[name] = max(by_work, by_bytes)
            check.add(
                f"Floor of a training step: {work}",
                name,
                operations_GFLOP=operations / 1e9,
                matrix_product_TFLOP_per_s=rate / 1e12,
                floor_by_operations_ms=by_work,
                bytes_if_fused_GB=least / 1e9,
                copy_GB_per_s=bandwidth / 1e9,
                floor_by_bytes_ms=by_bytes,
                bytes_of_separate_kernels_GB=separate / 1e9,
                their_time_ms=1000 * separate / bandwidth,
            )
    found: dict[str, float] = {}

    def measure(name: str, kind: str, network: type = PMM, **choice: bool) -> None:
        with check.part(f"step: {name}"):
            _reset_memory()
            start, step = time.perf_counter(), step_of(network, options, device, dtypes[kind], **choice)
            warm = seconds(step, device)
            for _ in range(5 if device.type == "cuda" else 1):  # one kernel after the other, captured, replayed
                seconds(step, device)
            first = time.perf_counter() - start
            count = sizes.steps if network is PMM else 2
            found[name] = median(seconds(step, device, count) for _ in range(sizes.rounds))
            check.add(
                f"Training step: {work}",
                name,
                step_ms=1000 * found[name],
                images_per_s=options.batch / found[name],
                to_the_floor=1000 * found[name] / floors[kind] if kind in floors else None,
                peak_memory_GiB=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
                first_step_s=warm,
                until_warm_s=first,
                host_synchronizations=_synchronizations(step) if device.type == "cuda" else None,
            )

    measure("bf16", "bf16")
    measure("FP32", "FP32")
    measure("bf16, without CUDA graph", "bf16", graph=False)
    measure("bf16, textbook Grad-CAM", "bf16", TextbookPMM)
    measure("FP32, textbook Grad-CAM", "FP32", TextbookPMM)
    data = None
    with check.part("synthetic data set"):
        from pmm_edge.data.dataset import scan
        from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic

        start = time.perf_counter()
        data = cached_synthetic(
            SyntheticConfig(train_identities=sizes.people, test_identities=8 if check.small else 100)
        )
        drawn = time.perf_counter() - start
        train = scan(data).train
        check.add("Data set", "synthetic", images=len(train), identities=train.identities, drawn_in_s=drawn)
    if data:
        _train_epochs(check, data, "bf16", compiled=False)
    measure("bf16, --compile", "bf16", compiled=True)
    if {"bf16", "bf16, --compile"} <= found.keys():
        ratio = found["bf16"] / found["bf16, --compile"]
        for name in {"bf16", "bf16, without CUDA graph"} & found.keys():
            faster = found[name] / found["bf16, --compile"]
            check.add("Ratios of training steps", f"{name} to bf16, --compile", ratio=faster)
        if data and ratio > 1.05:
            _train_epochs(check, data, "bf16, --compile", compiled=True)
        else:
            check.skip(f"{PAPER_EPOCHS} epochs with --compile", f"it is {ratio:.2f} times as fast")
    for name in dtypes:
        if {name, f"{name}, textbook Grad-CAM"} <= found.keys():
            ratio = found[f"{name}, textbook Grad-CAM"] / found[name]
            check.add("Ratios of training steps", f"textbook Grad-CAM to {name}", ratio=ratio)


def _reset_memory() -> None:
    """Free what the last network has left and start a new maximum."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _copy_bandwidth(device: Any, sizes: Namespace) -> float:
    """Bytes per second of a large copy, counting those read and those written."""
    import torch
    from train_step import seconds

    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> tuple[Any, None]:
        target.copy_(source)
        return target[0], None

    seconds(copy, device)
    return 2 * source.nbytes / min(seconds(copy, device, sizes.steps) for _ in range(sizes.rounds))


def _synchronizations(step: Callable[[], object]) -> int:
    """Number of times that a step waits for the GPU."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def _train_epochs(check: Check, data: Path, name: str, compiled: bool) -> None:
    """Epochs of the paper's training by `pmm_edge.train`, and the time of all 400 at this rate."""
    import torch

    from pmm_edge.runs import BEST
    from pmm_edge.trainer.step import PAPER_EPOCHS
    from pmm_edge.trainer.train import train

    sizes, out, ends = check.sizes, check.work / f"epochs{'-compiled' * compiled}", list[float]()
    shutil.rmtree(out, ignore_errors=True)

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "train" and done % (total // sizes.epochs) == 0:
            ends.append(time.perf_counter())

    settings = {"backbone_weights": "none", "precision": "bf16", "device": check.device.partition(":")[0]}
    settings |= {"epochs": sizes.epochs, "evaluate_every": sizes.epochs, "compile": compiled}
    settings |= {name: getattr(sizes.step, name) for name in ("backbone", "height", "width", "batch")} | sizes.training
    with check.part(f"epochs: {name}"):
        _reset_memory()
        start = time.perf_counter()
        result = train(data, preset="market1501", out=out, report=report, **settings)
        seconds = median(later - earlier for earlier, later in pairwise(ends))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        last = [line for line in lines if line["kind"] == "train"][-1]
        assert result.best and (out / BEST).is_file()
        check.add(
            f"Epochs of pmm train --preset market1501, {sizes.step.backbone} {sizes.step.height}x{sizes.step.width}",
            name,
            epochs=result.epochs_done,
            epoch_s=seconds,
            waiting_for_data_percent=100 * last["data_wait"],
            images_per_s=last["images_per_second"],
            paper_400_epochs_min=PAPER_EPOCHS * seconds / 60,
            whole_run_s=time.perf_counter() - start,
            peak_memory_GiB=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
            Rank1_percent=100 * result.best.rank1,
            mAP_percent=100 * result.best.mAP,
        )


def _checkpoint(check: Check) -> tuple[Path, Path]:
    """The checkpoint that stage c has trained, or random weights; and images to compare models on."""
    from inference import FEW, random_checkpoint

    from pmm_edge.data.synthetic import cached_synthetic
    from pmm_edge.runs import BEST, about_run

    trained, step = check.work / "epochs", check.sizes.step
    about = about_run(trained)
    if about and (trained / BEST).is_file() and Path(about.data).is_dir():
        return trained / BEST, Path(about.data)
    check.skip("a trained network", "stage c has left none in this folder; weights are random")
    path = check.work / "random.pt"
    return random_checkpoint(path, step.backbone, step.height, step.width), cached_synthetic(FEW)


def _export(check: Check, checkpoint: Path, data: Path, precision: str) -> Path:
    """The ONNX file of a checkpoint, and its weights as safetensors next to the one in FP32; from stage d if there."""
    from pmm_edge.export import export
    from pmm_edge.files import sha256

    path = check.work / f"export-{sha256(checkpoint)[:8]}" / f"{precision}.onnx"
    int8 = {"calibration": data, "calibration_method": "minmax"} if precision == "int8" else {}
    if not path.is_file():
        export(checkpoint, out=path, precision=precision, safetensors=precision == "fp32", **int8)
    return path


def _compare(check: Check, models: dict[str, Path], checkpoint: Path, data: Path) -> None:
    """Parity of models with the checkpoint by `pmm bench`, then latency of all."""
    from pmm_edge.bench import bench
    from pmm_edge.bench.timing import measure_latency
    from pmm_edge.images import read_crops
    from pmm_edge.runtime import load
    from pmm_edge.runtime.embed_files import find_images

    out, images = check.work / f"bench-{check.stage}.json", find_images(data).paths
    with check.part("parity"):
        options: dict[str, Any] = {
            "device": check.device,
            "batch_sizes": check.sizes.batches,
            "parity_only": True,
            "out": out,
        }
        found = bench([*models.values()], reference=checkpoint, data=data, **options).report
        for name, figures in zip(models, found.models, strict=True):
            change = figures.retrieval_change
            check.add(
                "Parity with the checkpoint in PyTorch FP32",
                name,
                images=found.images,
                smallest_cosine=figures.parity.whole.cosine_min if figures.parity else None,
                mean_cosine=figures.parity.whole.cosine_mean if figures.parity else None,
                mAP_percent=100 * figures.retrieval.mAP if figures.retrieval else None,
                mAP_change_points=100 * change.mAP.difference if change else None,
                passed="no" if figures.failures else "yes",
            )
            check.found["errors"] += [f"parity of {name}: {one.kind.value} {one.detail}" for one in figures.failures]
    embedders = {"PyTorch FP32": load(checkpoint, check.device)}
    embedders |= {name: load(path, check.device) for name, path in models.items() if path.suffix != ".safetensors"}
    spec = embedders["PyTorch FP32"].spec
    crops = read_crops(images[:8], spec.input.height, spec.input.width)
    for batch in check.sizes.batches:
        with check.part(f"latency at batch {batch}"):
            timed = measure_latency([*embedders.values()], [crops] * len(embedders), batch, check.sizes.runs, 0.3)
            for name, latency in zip(embedders, timed, strict=True):
                check.add(
                    f"Latency, {spec.backbone} {spec.input.height}x{spec.input.width}, crops to embeddings",
                    f"{name}, batch {batch}",
                    median_ms=latency.median_ms,
                    p90_ms=latency.p90_ms,
                    on_the_GPU_ms=latency.gpu_ms,
                    images_per_s=latency.images_per_second,
                )


def measure_inference(check: Check) -> None:
    """PyTorch, and ONNX Runtime where its CUDA provider loads: parity and latency."""
    from pmm_edge.doctor import ADDITION
    from pmm_edge.errors import PmmError
    from pmm_edge.runtime.onnx_backend import open_session

    checkpoint, data = _checkpoint(check)
    fp32 = _export(check, checkpoint, data, "fp32")
    models = {"exported weights in PyTorch": fp32.with_suffix(".safetensors")}
    try:
        open_session(Path("x + x"), check.device, ADDITION)
        models |= {"ONNX Runtime FP32": fp32, "ONNX Runtime FP16": _export(check, checkpoint, data, "fp16")}
    except PmmError as error:
        check.skip("ONNX Runtime CUDA", error.problem)
    _compare(check, models, checkpoint, data)


def measure_engines(check: Check) -> None:
    """TensorRT engines: build, precision that the engine reports, parity, latency next to trtexec."""
    from pmm_edge.doctor import Status, check_tensorrt
    from pmm_edge.export.tensorrt import build_engine
    from pmm_edge.runtime.manifest import BatchProfile, BuildSettings

    usable = check_tensorrt()
    if usable.status is not Status.OK:
        check.skip("TensorRT", usable.detail)
        return
    checkpoint, data = _checkpoint(check)
    engines: dict[str, Path] = {}
    for precision in ("fp32", "fp16", "int8"):
        name = f"TensorRT {precision.upper()}"
        with check.part(name):
            path = _export(check, checkpoint, data, precision)
            built = build_engine(path, path.with_suffix(".engine"), BuildSettings(BatchProfile(*check.sizes.batches)))
            counts = ", ".join(f"{count} {kind}" for kind, count in built.manifest.precision.products.items())
            size, seconds = built.manifest.engine_size / 1e6, built.manifest.build_seconds
            check.add("Engines", name, size_MB=size, build_s=seconds, convolutions_and_products=counts)
            engines[name] = built.path
    if engines:
        _compare(check, engines, checkpoint, data)
    if not (trtexec := shutil.which("trtexec")):
        check.skip("trtexec", "not on the PATH")
        return
    for name, path in engines.items():
        for batch in check.sizes.batches:
            with check.part(f"trtexec: {name}"):
                shape = f"images:{batch}x{check.sizes.step.height}x{check.sizes.step.width}x3"
                command = [trtexec, f"--loadEngine={path}", f"--shapes={shape}", "--useCudaGraph", "--duration=1"]
                printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
                line = next(line for line in printed.splitlines() if "GPU Compute Time: min" in line)
                check.add("trtexec", f"{name}, batch {batch}", median_ms=float(line.split("median = ")[1].split()[0]))


def compare_methods(check: Check) -> None:
    """The rows of the paper's tables on the synthetic set, trained by compare_methods.py in parallel processes."""
    from method_tables import FIGURES, rows_named

    from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
    from pmm_edge.machine import threads

    sizes, epochs = check.sizes, check.epochs
    rows, out = rows_named(sizes.rows), check.work / "methods"
    data = cached_synthetic(SyntheticConfig(**sizes.method_data))
    flags = ["--out", str(out), "--epochs", str(epochs), "--dtype", "fp32" if check.small else "bf16"]
    flags += [
        word
        for text in [*sizes.methods.split(), f"device={check.device.partition(':')[0]}"]
        for word in ("--set", text)
    ]
    waiting = [(name, seed) for seed in sizes.seeds for name in rows]
    total, running, started = len(waiting), dict[tuple[str, int], subprocess.Popen[bytes]](), time.perf_counter()
    script, environment = Path(__file__).with_name("compare_methods.py"), {**os.environ, "OMP_NUM_THREADS": "1"}
    out.mkdir(parents=True, exist_ok=True)
    finished: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
    while (waiting or running) and check.left > 3:
        while waiting and len(running) < max(1, threads()):
            name, seed = waiting.pop(0)
            command = [sys.executable, str(script), str(data), "--methods", name, "--seeds", str(seed), *flags]
            with (out / f"{name}-{seed}.log").open("wb") as log:
                running[name, seed] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        for (name, seed), process in list(running.items()):
            if process.poll() is not None:
                del running[name, seed]
                row = rows[name]
                folder = f"{row.get('method', 'pmm')}-{row.get('mix', 'a-hard-mix')}-seed-{seed}"
                results = sorted(out.glob(f"*/{folder}/result.json"), key=lambda path: path.stat().st_mtime)
                if process.returncode or not results:
                    lines = (out / f"{name}-{seed}.log").read_text("utf-8", "replace").strip().splitlines()
                    reason = lines[-1] if lines else f"exit code {process.returncode}"
                    check.found["errors"].append(f"{name}, seed {seed}: {reason}")
                    check.save()
                    continue
                result = json.loads(results[-1].read_text())
                finished[name].append(result)
                figures = {f"{figure}_percent": 100 * result[figure] for figure in FIGURES}
                check.add("Each training", f"{name}, seed {seed}", **figures, epochs=result["epochs"])
        time.sleep(0.1)
    for process in running.values():
        process.kill()
    table = f"Methods: {data.name}, {epochs} epochs, {sizes.methods}"
    for name, results in finished.items():
        if results:
            cells = {figure: [100 * result[figure] for result in results] for figure in FIGURES}
            means = {f"{figure}_percent": _mean_and_deviation(values) for figure, values in cells.items()}
            check.add(table, name, seeds=len(results), **means)
    done = sum(map(len, finished.values()))
    check.add("Trainings", "finished", runs=done, of=total, in_s=time.perf_counter() - started)
    if running or waiting:
        check.found["status"] = "timeout"
        check.skip(f"{len(running) + len(waiting)} of {total} trainings", "not finished within the limit")


def _mean_and_deviation(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def measure_energy_per_image(check: Check) -> None:
    """Energy of a training step and of inference, by the counter of the GPU; idle power is included."""
    import numpy as np
    import torch
    from train_step import PMM, seconds, step_of

    from pmm_edge.bench import resources
    from pmm_edge.runtime import load

    table, gpu, sizes = "Energy (NVML, idle power included)", resources.open_gpu(check.device), check.sizes
    if gpu is None or gpu.joules is None:
        check.skip("energy", "NVML reports no energy counter")
        return
    device, batch = torch.device(check.device), sizes.step.batch
    with check.part("training step"):
        step = step_of(PMM, sizes.step, device, torch.bfloat16)
        for _ in range(6):
            seconds(step, device)
        before, start, steps = gpu.joules, time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < sizes.energy_seconds:
            seconds(step, device, sizes.steps)
            steps += sizes.steps
        joules = gpu.joules - before
        row = f"training step, bf16, {sizes.step.backbone} {sizes.step.height}x{sizes.step.width}, batch {batch}"
        check.add(table, row, mJ_per_image=1000 * joules / (steps * batch), W=joules / elapsed)
    checkpoint, _ = _checkpoint(check)
    crops = np.zeros((sizes.batches[-1], sizes.step.height, sizes.step.width, 3), np.uint8)
    for path in [checkpoint, *sorted(check.work.glob("export-*/*.engine"))]:
        with check.part(f"inference of {path.name}"):
            embedder = load(path, check.device)
            if used := resources.measure_energy(embedder, crops, sizes.energy_seconds):
                row = f"inference, {embedder.backend} {embedder.spec.precision}, batch {used.batch}"
                check.add(table, row, mJ_per_image=1000 * used.joules_per_embedding, W=used.watts)


@dataclass(frozen=True)
class Stage:
    """A stage, the modules that it cannot do without, and its share of the time."""

    title: str
    run: Callable[[Check], None]
    share: int
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [name for name in dict.fromkeys([*REQUIRED, *self.needs]) if find_spec(name) is None]

    @property
    def seconds(self) -> int:
        """Its share, or time to say what is missing."""
        return 15 if self.missing else self.share


STAGES = {
    "a": Stage("machine, driver, versions", describe_machine, 30),
    "b": Stage("pytest -m gpu", run_gpu_tests, 90, (*TRAINING, "pytest", "cloudpickle")),
    "c": Stage("training step and epochs", measure_training, 200, TRAINING),
    "d": Stage("ONNX Runtime CUDA and PyTorch", measure_inference, 65, EXPORT),
    "e": Stage("TensorRT engines", measure_engines, 110, (*EXPORT, "tensorrt", "cuda")),
    "g": Stage("energy per image", measure_energy_per_image, 25, TRAINING),
    "f": Stage("table of methods", compare_methods, 165, TRAINING),
}
"""In the order in which they run: f is the last one and has all the time that others leave."""


# The process that starts the stages. Its only imports are those of the standard library.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="".join(STAGES), help="letters of the stages; default: all")
    parser.add_argument("--limit", type=float, default=600, help="seconds for all stages; default: %(default)s")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for the stages, in a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, help="epochs of each training of stage f; default: 100")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and what is missing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output = options.output.absolute()
    if options.child:
        sys.exit(run_stage(options))
    if set(options.stages) - STAGES.keys() or not options.stages or options.limit <= 0:
        parser.error(f"--stages takes letters of {''.join(sorted(STAGES))}, --limit a positive number")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as site:
        if options.wheels:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
            if not (wheels := sorted(map(str, options.wheels.glob("*.whl")))):
                parser.error(f"{options.wheels} has no wheels")
            subprocess.run([*install, *wheels], check=True)
        sys.path.insert(0, site)
        chosen = {letter: stage for letter, stage in STAGES.items() if letter in options.stages}
        sys.exit(plan(options, chosen) if options.dry_run else run_stages(options, chosen, site))


def plan(options: argparse.Namespace, chosen: dict[str, Stage]) -> int:
    """Print what would run, with limits if every stage uses all of its own, and what is missing."""
    whole = sum(stage.seconds for stage in chosen.values())
    for letter, stage in chosen.items():
        limit, missing = options.limit * stage.seconds / whole, ", ".join(stage.missing)
        print(f"{letter}  {limit:4.0f} s  {stage.title}" + (f"; missing: {missing}" if missing else ""))
        print(f"           {stage.run.__doc__}")
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return 0
    print("no NVIDIA driver here" + ("" if options.small else ": only stage a can run; --small runs all on the CPU"))
    return 0


def run_stages(options: argparse.Namespace, chosen: dict[str, Stage], site: str) -> int:
    """Run stages one after the other, each with its share of the time that is left; return the exit code."""
    path, deadline = options.output / "gpu_check.json", time.monotonic() + options.limit
    report: dict[str, Any] = {"schema": 1, "stages": {}}
    with suppress(OSError, ValueError):  # stages of an earlier run
        report = json.loads(path.read_text("utf-8"))
    (options.output / "work").mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [site, str(ROOT), os.environ.get("PYTHONPATH")]))
    if options.small:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling for a CPU takes minutes
    interrupted = False
    shares = [stage.seconds for stage in chosen.values()]
    for number, (letter, stage) in enumerate(chosen.items()):
        limit = (deadline - time.monotonic()) * shares[number] / sum(shares[number:])
        print(f"stage {letter}, {stage.title}: at most {limit:.0f} s", flush=True)
        begun = time.monotonic()
        try:
            found = _in_process(options, letter, limit, environment)
        except KeyboardInterrupt:
            interrupted, found = True, _result(options, letter, "interrupted")
        found |= {"title": stage.title, "seconds": round(time.monotonic() - begun, 1), "limit": round(limit, 1)}
        found |= {"command": shlex.join(["python", *sys.argv]), "small": options.small}
        found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report["stages"][letter] = found
        write(path, json.dumps(report, indent=1) + "\n")
        write(path.with_suffix(".md"), markdown(report))
        print(f"  {found['status']} in {found['seconds']:.0f} s", *found["errors"], *found["skipped"], sep="\n  ")
        if interrupted:
            return INTERRUPTED
    print(f"written: {path}, {path.with_suffix('.md')}")
    return int(any(report["stages"][letter]["status"] in ("failed", "timeout") for letter in chosen))


def _in_process(options: argparse.Namespace, letter: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage in a process of its own, which leads a group, so that all that it has started is killed with it."""
    (options.output / "work" / f"{letter}.json").unlink(missing_ok=True)
    command = [sys.executable, sys.argv[0], "--child", letter, "--limit", str(limit), "--output", str(options.output)]
    command += ["--small"] * options.small + (["--epochs", str(options.epochs)] if options.epochs else [])
    with (options.output / "work" / f"{letter}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        return _result(options, letter, "" if code == 0 else f"exit code {code}")
    except subprocess.TimeoutExpired:
        return _result(options, letter, "timeout")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _result(options: argparse.Namespace, letter: str, ended: str) -> dict[str, Any]:
    """What a stage has saved; `ended` is empty, how it was stopped, or its exit code."""
    found: dict[str, Any] = {"figures": [], "skipped": [], "errors": [], "facts": {}}
    with suppress(OSError, ValueError):
        found = json.loads((options.output / "work" / f"{letter}.json").read_text("utf-8"))
    if ended in ("timeout", "interrupted"):
        return found | {"status": ended}
    if ended and not found["errors"]:
        lines = (options.output / "work" / f"{letter}.log").read_text("utf-8", "replace").strip().splitlines()
        found["errors"].append(f"{ended}: {lines[-1] if lines else 'no output'}")
    empty = "skipped" if found["skipped"] and not found["figures"] else "ok"
    return {"status": "failed" if found["errors"] else empty} | found


def run_stage(options: argparse.Namespace) -> int:
    """Run a stage in this process; the exit code is that of an exception if it ends the stage."""
    signal.alarm(int(options.limit) + 10)  # if the process that would stop it is killed
    check = Check(options.child, options.output, options.limit, options.small, options.epochs)
    import torch

    if torch.cuda.is_available():
        check.found["facts"]["device"] = torch.cuda.get_device_name(0)
    elif not options.small and options.child != "a":
        check.skip("everything", "PyTorch finds no GPU")
        return 0
    with check.part(STAGES[options.child].title):
        STAGES[options.child].run(check)
    check.save()
    return 0


def markdown(report: dict[str, Any]) -> str:
    """The page: facts, then the tables of each stage, and what was skipped or failed."""
    lines = ["# GPU check", ""]
    for letter, stage in sorted(report["stages"].items()):
        where = stage["facts"].get("device", "CPU")
        lines += [f"## {letter}: {stage['title']}", ""]
        lines += [
            f"{where}, {stage['date']}, {stage['status']} in {stage['seconds']:.0f} s (limit {stage['limit']:.0f} s):"
        ]
        lines += [f"`{stage['command']}`", ""]
        lines += [f"- {name}: {value}" for name, value in stage["facts"].items()] + [""]
        tables: dict[str, dict[str, dict[str, Any]]] = {}
        for one in stage["figures"]:
            tables.setdefault(one["table"], {}).setdefault(one["row"], {})[one["figure"]] = one["value"]
        for title, rows in tables.items():
            columns = dict.fromkeys(name for row in rows.values() for name in row)
            lines += [f"**{title}**", "", f"| | {' | '.join(name.replace('_', ' ') for name in columns)} |"]
            lines += [f"| --- {'| --- ' * len(columns)}|"]
            lines += [
                f"| {name} | {' | '.join(_cell(row.get(key)) for key in columns)} |" for name, row in rows.items()
            ]
            lines += [""]
        lines += [f"- skipped: {text}" for text in stage["skipped"]] + [f"- error: {text}" for text in stage["errors"]]
        lines += [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6f}" if 0.9 < value <= 1 else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
