"""The stages of `gpu_check.py`. Each imports what it needs, because packages and libraries may be missing."""

from __future__ import annotations

import gc
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_check import ROOT, STAGES, write

TRTEXEC_FOLDER = "/usr/src/tensorrt/bin"  # of NVIDIA's packages and containers, not on the PATH
PACKAGES = ("torchvision", "triton", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "cuda-bindings")

FULL = Namespace(
    device="cuda:0",
    step=Namespace(backbone="resnet50", height=384, width=128, batch=64),
    rounds=5,  # of which the median is shown
    steps=10,  # in a round, before the device is waited for
    identities={"train_identities": 751},
    epochs=20,
    batches=(1, 8, 32),  # of inference
    latency=(50, 0.3),  # runs and seconds, at least
    rows="baseline,BDB,PMM,none,CutOut",
    seeds=(0, 1, 2),
    # 20 people per batch divide the 200 of the set: a smaller last batch would not be replayed as a CUDA graph.
    # Estimate for an H200, from the bytes of a step and what one of ResNet-50 takes: 2 to 3 ms, a training about 5 s.
    methods={"backbone": "resnet18", "height": 144, "width": 64, "batch": 80, "images_per_identity": 4, "lr": 1e-3}
    | {"schedule": "paper", "erase_size": 16, "mix_block_size": "3x1", "mix_blocks": 1},
    method_data={},
    energy_seconds=6.0,
)
_FEW = {"train_identities": 8, "test_identities": 4, "cameras": 2}
SMALL = Namespace(
    device="cpu",
    step=Namespace(backbone="resnet10", height=96, width=32, batch=8),
    rounds=1,
    steps=1,
    identities=_FEW,
    epochs=3,
    batches=(1, 2),
    latency=(5, 0.01),
    rows="PMM,none",
    seeds=(0,),
    methods={"backbone": "resnet10", "height": 48, "width": 32, "batch": 8, "mix_block_size": "1x1"},
    method_data=_FEW,
    energy_seconds=0.2,
)


class Check:
    """What a stage has found so far, saved after every figure."""

    def __init__(self, letter: str, work: Path, sizes: Namespace, seconds: float, method_epochs: int) -> None:
        self.letter, self.work, self.sizes, self.method_epochs = letter, work, sizes, method_epochs
        self.deadline = time.monotonic() + seconds
        self.device = torch.device(sizes.device)
        self.found: dict[str, Any] = {"figures": [], "skipped": [], "errors": [], "facts": {}}

    def save(self) -> None:
        write(self.work / f"{self.letter}.json", json.dumps(self.found))

    def add(self, table: str, row: str, figures: dict[str, float | str | None]) -> None:
        """Record figures of a row of a table, named with their units."""
        known = {name: value for name, value in figures.items() if value is not None}
        self.found["figures"] += [{"table": table, "row": row, "figure": name, "value": known[name]} for name in known]
        print(f"{table} | {row} | {known}", flush=True)
        self.save()

    def goal(self, what: str, value: float | None, bound: float, at_least: bool = False) -> None:
        """Compare a figure, if it was measured, with what is to be reached on an H100."""
        if value is not None:
            met = value >= bound if at_least else value <= bound
            text = f"{'at least' if at_least else 'at most'} {bound:g}"
            self.add("Goals on an H100", what, {"measured": value, "goal": text, "met": "yes" if met else "no"})

    def skip(self, what: str, why: str) -> None:
        """Record what is left out, and why."""
        self.found["skipped"].append(f"{what}: {' '.join(why.split())}")
        self.save()

    def fail(self, what: str) -> None:
        self.found["errors"].append(" ".join(what.split()))
        self.save()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record an error in the block; the rest of the stage still runs. A killed stage names the part it was in."""
        outer, self.found["part"] = self.found.get("part"), name
        self.save()
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        finally:
            self.found["part"] = outer


def run_stage(letter: str, work: Path, options: Namespace) -> None:
    """Run a stage in this process, which ends shortly after its limit even if nobody stops it."""
    left = max(0.0, float(options.child[2]) - time.monotonic())  # of the time that began before Python did
    signal.alarm(int(left) + 10)
    check = Check(letter, work, SMALL if options.small else FULL, left, 1 if options.small else options.epochs)
    if torch.cuda.is_available():
        check.found["facts"]["device"] = torch.cuda.get_device_name(0)
    elif not options.small and letter != "a":
        check.skip("everything", "PyTorch finds no GPU")
        return
    with check.part(STAGES[letter].title):
        RUN[letter](check)
    check.save()


def describe_machine(check: Check) -> None:
    facts, packages = check.found["facts"], []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    own = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__} with CUDA {torch.version.cuda}"]
    facts["packages"] = ", ".join([*own, *packages])
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        memory, capability = f"{about.total_memory / 2**30:.0f} GiB", f"compute capability {about.major}.{about.minor}"
        facts["GPU"] = f"{about.name}, {memory}, {capability}, cuDNN {torch.backends.cudnn.version()}"
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(ROOT), "log", "-1", "--format=%h of %cs"]
        facts["pmm-edge"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    check.save()

    from pmm_edge.bench.resources import machine_state, open_gpu  # packages of pmm-edge may be missing
    from pmm_edge.doctor import examine
    from pmm_edge.machine import processor

    state, gpu = machine_state(), open_gpu(check.sizes.device)
    facts["processor"] = f"{processor()}, {state.cores:g} usable cores, load of other processes {state.load}"
    if gpu:
        facts["driver"] = f"{gpu.driver}, highest SM clock {gpu.max_mhz} MHz"
    check.save()
    for name, finding in examine()["checks"].items():
        facts[f"doctor, {name}"] = f"{finding.status.value}: {finding.detail}"


def run_tests(check: Check) -> None:
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-vv", "-rfEs", "-m", "gpu", "-p", "no:cacheprovider", *map(str, files)]
    outcomes = dict.fromkeys(("PASSED", "FAILED", "ERROR", "SKIPPED"), 0)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        assert tests.stdout
        for line in tests.stdout:
            print(line, end="", flush=True)
            first, *words = line.split() or [""]
            if "::" in first and words and words[0] in outcomes:
                outcomes[words[0]] += 1
                check.found["figures"] = []
                if outcomes["SKIPPED"] < sum(outcomes.values()):  # a stage without figures is skipped as a whole
                    check.add("pytest -m gpu", "tests", {name.lower(): count for name, count in outcomes.items()})
            elif first == "SKIPPED":
                check.skip("pytest", line.partition("] ")[2])
            elif first in ("FAILED", "ERROR"):
                check.fail(line)
    if tests.returncode not in (0, 5) and not check.found["errors"]:  # 5: nothing was selected
        check.fail(f"pytest ended with exit code {tests.returncode}")


def measure_training(check: Check) -> None:
    from train_step import PMM, PRODUCT_SIDES, TextbookPMM, matrix_product, operations_of, seconds, step_of, traffic_of

    device, sizes, options, on_gpu = check.device, check.sizes, check.sizes.step, check.device.type == "cuda"
    work = f"{options.backbone} {options.height}x{options.width}, batch {options.batch}"
    dtypes = {"FP32": torch.float32, "bf16": torch.bfloat16}
    floors: dict[str, float] = {}
    by_operations, by_all_bytes = dict[str, float](), dict[str, float]()

    def fastest(step: Callable) -> float:
        seconds(step, device)
        return min(seconds(step, device, sizes.steps) for _ in range(sizes.rounds))

    def floor(name: str, dtype: torch.dtype) -> None:  # its tensors are freed before memory is measured
        with check.part(f"floor in {name}"):
            # Convolutions may use TF32 by default, matrix products may not.
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
            rate = 2 * PRODUCT_SIDES[device.type] ** 3 / fastest(matrix_product(device, dtype))
            torch.backends.cuda.matmul.allow_tf32 = False
            source = torch.ones(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            bandwidth = 2 * source.nbytes / fastest(lambda: (target.copy_(source)[0], None))
            operations, (products, every) = operations_of(options), traffic_of(options, dtype)
            by_operations[name], by_all_bytes[name] = operations / rate, every / bandwidth
            floors[name] = max(by_operations[name], products / bandwidth)
            table = f"Floor of a step, {work}: operations at the rate of a matrix product, bytes at that of a copy"
            work_done = {"operations, GFLOP": operations / 1e9, "matrix product, TFLOP/s": rate / 1e12}
            check.add(table, name, work_done | {"floor by operations, ms": 1000 * operations / rate})
            moved = {"bytes of products and Adam, GB": products / 1e9, "copy, GB/s": bandwidth / 1e9}
            check.add(table, name, moved | {"floor by bytes, ms": 1000 * products / bandwidth})
            unfused = {"bytes of all operators, GB": every / 1e9, "their time, ms": 1000 * every / bandwidth}
            check.add(table, name, unfused)

    for name, dtype in dtypes.items():
        floor(name, dtype)
    found: dict[str, float] = {}

    def measure(name: str, network: type[PMM] = PMM, **choice: bool) -> None:
        dtype = name.partition(",")[0]
        with check.part(f"step in {name}"):
            reset_memory()
            start, step = time.perf_counter(), step_of(network, options, device, dtypes[dtype], **choice)
            for _ in range(6 if on_gpu else 2):  # one kernel after the other, then captured, then replayed
                seconds(step, device)
            warm, count = time.perf_counter() - start, sizes.steps if network is PMM else 1
            found[name] = median(seconds(step, device, count) for _ in range(sizes.rounds))
            table, to_floor = f"Training step, {work}", found[name] / floors[dtype] if dtype in floors else None
            check.add(table, name, {"step, ms": 1000 * found[name], "images/s": options.batch / found[name]})
            check.add(table, name, {"times the floor": to_floor, "memory, GiB": _peak_memory(), "warm after, s": warm})
            waits = _synchronizations(step) if on_gpu else None
            check.add(table, name, {"waits for the GPU": waits})
            if dtype in floors and name in ("bf16", "bf16, --compile"):
                what = f"step in {name}"
                check.goal(f"{what}, times the floor by operations", found[name] / by_operations[dtype], 1.5)
                check.goal(f"{what}, times the bytes of all operators", found[name] / by_all_bytes[dtype], 1.5)
                check.goal(f"{what}, waits for the GPU", waits, 0)

    def ratio(slower: str, faster: str) -> float:
        value = found.get(slower, 0.0) / found.get(faster, 1.0)
        if value and faster in found:
            check.add("Ratios of steps", f"{slower} to {faster}", {"ratio": value})
        return value

    measure("bf16")
    measure("FP32")
    measure("bf16, without CUDA graph", graph=False)
    for name in dtypes:
        measure(f"{name}, textbook Grad-CAM", TextbookPMM)
        ratio(f"{name}, textbook Grad-CAM", name)
    start = time.monotonic()
    _train_epochs(check, "bf16", compiled=False)
    epochs, start = time.monotonic() - start, time.monotonic()
    measure("bf16, --compile", compiled=True)
    needed = epochs + time.monotonic() - start  # it is compiled once more
    left = max(0.0, check.deadline - time.monotonic())
    ratio("bf16, without CUDA graph", "bf16, --compile")
    faster = ratio("bf16", "bf16, --compile")
    check.goal("--compile, times as fast as without", faster, 1.2, at_least=True)
    if faster <= 1.05:
        check.skip("epochs with --compile", f"its step is {faster:.2f} times as fast")
    elif left < needed:
        check.skip("epochs with --compile", f"they take about {needed:.0f} s, and {left:.0f} s are left")
    else:
        _train_epochs(check, "bf16, --compile", compiled=True)


def reset_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _synchronizations(step: Callable) -> int:
    """Number of times that a step waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in caught)


def _train_epochs(check: Check, name: str, compiled: bool) -> None:
    """Epochs of the paper's training by `pmm_edge.train`, data pipeline included, and the time of all 400."""
    from pmm_edge.data.dataset import scan
    from pmm_edge.data.synthetic import SyntheticConfig, cached_synthetic
    from pmm_edge.trainer.step import PAPER_EPOCHS
    from pmm_edge.trainer.train import train

    sizes, out, ends = check.sizes, check.work / f"epochs{'-compiled' * compiled}", list[float]()

    def report(what: str, done: int, total: int, detail: str = "") -> None:
        if what == "train" and done % (total // sizes.epochs) == 0:
            ends.append(time.perf_counter())

    with check.part(f"epochs in {name}"):
        start = time.perf_counter()
        data = cached_synthetic(SyntheticConfig(**sizes.identities))
        drawn, split = time.perf_counter() - start, scan(data).train
        table = f"pmm train --preset market1501, synthetic set of {len(split)} images of {split.identities} identities"
        settings = vars(sizes.step) | {"erase_size": min(64, sizes.step.width), "epochs": sizes.epochs}
        settings |= {"evaluate_every": sizes.epochs, "backbone_weights": "none", "compile": compiled}
        settings |= {"precision": "bf16", "device": check.device.type}
        shutil.rmtree(out, ignore_errors=True)
        reset_memory()
        start = time.perf_counter()
        best = train(data, preset="market1501", out=out, report=report, **settings).best
        whole, epoch = time.perf_counter() - start, median(after - before for before, after in pairwise(ends))
        lines = map(json.loads, (out / "metrics.jsonl").read_text("utf-8").splitlines())
        last = [line for line in lines if line["kind"] == "train"][-1]
        check.add(table, name, {"epochs": sizes.epochs, "epoch, s": epoch, "images/s": last["images_per_second"]})
        check.add(table, name, {"waiting for data, %": 100 * last["data_wait"], "memory, GiB": _peak_memory()})
        check.add(table, name, {"400 epochs, min": PAPER_EPOCHS * epoch / 60, "run with two evaluations, s": whole})
        check.goal(f"400 epochs in {name}, min", PAPER_EPOCHS * epoch / 60, 10)
        check.add(table, name, {"Rank-1, %": 100 * best.rank1, "mAP, %": 100 * best.mAP} if best else {})
        check.add(table, name, {"drawing the set, s": drawn if drawn > 0.1 else "cached"})


def _checkpoint(check: Check) -> tuple[Path, Path]:
    """The checkpoint that stage c has trained, or one with random weights; and images to compare models on."""
    from inference import FEW, random_checkpoint

    from pmm_edge.data.synthetic import cached_synthetic
    from pmm_edge.runs import BEST, about_run

    trained, step = check.work / "epochs", check.sizes.step
    about = about_run(trained)
    if about and (trained / BEST).is_file():
        return trained / BEST, Path(about.data)
    check.skip("a trained network", "stage c has not trained one; weights are random")
    path = check.work / "random.pt"
    return random_checkpoint(path, step.backbone, step.height, step.width), cached_synthetic(FEW)


def _export(check: Check, checkpoint: Path, data: Path, precision: str) -> Path:
    """The ONNX file of a checkpoint, from an earlier stage if there; in FP32, weights for PyTorch next to it."""
    from pmm_edge.export import export

    path = check.work / f"{checkpoint.parent.name}-{checkpoint.stem}-{precision}.onnx"
    int8 = {"calibration": data, "calibration_method": "minmax"} if precision == "int8" else {}
    if not path.is_file():
        export(checkpoint, out=path, precision=precision, safetensors=precision == "fp32", **int8)
    return path


def _compare(check: Check, models: dict[str, Path], checkpoint: Path, data: Path, device: str | None = None) -> None:
    """Parity of models with their checkpoint by `pmm_edge.bench`, then the latency of all; by default on a GPU."""
    from pmm_edge.bench import bench
    from pmm_edge.bench.timing import measure_latency
    from pmm_edge.images import read_crops
    from pmm_edge.runtime import load
    from pmm_edge.runtime.embed_files import find_images

    sizes, table = check.sizes, "Parity with the checkpoint in PyTorch FP32"
    with check.part("parity"):
        common: dict[str, Any] = {"reference": checkpoint, "data": data, "device": device, "parity_only": True}
        out = check.work / f"bench-{check.letter}.json"
        found = bench([*models.values()], batch_sizes=sizes.batches, out=out, **common).report
        for name, model in zip(models, found.models, strict=True):
            if model.parity:
                whole = model.parity.whole
                closeness = {"smallest cosine": whole.cosine_min, "mean cosine": whole.cosine_mean}
                check.add(table, name, {"images": found.images, **closeness})
            if model.retrieval and model.retrieval_change:
                change = 100 * model.retrieval_change.mAP.difference
                check.add(table, name, {"mAP, %": 100 * model.retrieval.mAP, "change, points": change})
            check.add(table, name, {"gates": "failed" if model.failures else "passed"})
            for one in model.failures:
                check.fail(f"parity of {name}: {one.kind.value} {one.detail}")
    embedders = {"PyTorch FP32": load(checkpoint, device)}
    embedders |= {name: load(path, device) for name, path in models.items() if path.suffix != ".safetensors"}
    crops = read_crops(find_images(data).paths[:8], sizes.step.height, sizes.step.width)
    table = f"Latency, {sizes.step.backbone} {sizes.step.height}x{sizes.step.width}, from crops to embeddings"
    for batch in sizes.batches:
        with check.part(f"latency at batch {batch}"):
            timed = measure_latency([*embedders.values()], [crops] * len(embedders), batch, *sizes.latency)
            for name, one in zip(embedders, timed, strict=True):
                figures = {"median, ms": one.median_ms, "p90, ms": one.p90_ms, "images/s": one.images_per_second}
                check.add(table, f"{name}, batch {batch}", figures | {"on the GPU, ms": one.gpu_ms})


def measure_inference(check: Check) -> None:
    from pmm_edge.doctor import ADDITION
    from pmm_edge.errors import PmmError
    from pmm_edge.runtime.onnx_backend import open_session

    if missing := STAGES["d"].missing:
        check.skip("everything", f"missing modules: {', '.join(missing)}")
        return
    checkpoint, data = _checkpoint(check)
    fp32 = _export(check, checkpoint, data, "fp32")
    models = {"exported weights in PyTorch": fp32.with_suffix(".safetensors")}
    try:
        open_session(Path("x + x"), check.sizes.device, ADDITION)
        models |= {"ONNX Runtime FP32": fp32, "ONNX Runtime FP16": _export(check, checkpoint, data, "fp16")}
    except PmmError as error:
        check.skip("ONNX Runtime CUDA", error.problem)
    _compare(check, models, checkpoint, data, check.sizes.device)


def measure_engines(check: Check) -> None:
    from pmm_edge.doctor import Status, check_tensorrt
    from pmm_edge.export.tensorrt import build_engine
    from pmm_edge.runtime.manifest import BatchProfile, BuildSettings

    if (usable := check_tensorrt()).status is not Status.OK:
        check.skip("TensorRT", usable.detail)
        return
    checkpoint, data = _checkpoint(check)
    engines: dict[str, Path] = {}
    smallest, *_, largest = check.sizes.batches
    profile = BatchProfile(smallest, check.sizes.batches[1], largest)
    for precision in ("fp32", "fp16", "int8"):
        with check.part(f"engine in {precision}"):
            path = _export(check, checkpoint, data, precision)
            built = build_engine(path, path.with_suffix(".engine"), BuildSettings(profile))
            about, name = built.manifest, f"TensorRT {precision.upper()}"
            counts = ", ".join(f"{count} {kind}" for kind, count in about.precision.products.items())
            figures = {"size, MB": about.engine_size / 1e6, "build, s": about.build_seconds, "products": counts}
            check.add(f"Engines, batch profile {profile}", name, figures)
            engines[name] = built.path
    if engines:
        _compare(check, engines, checkpoint, data)
    if not (trtexec := shutil.which("trtexec") or shutil.which("trtexec", path=TRTEXEC_FOLDER)):
        check.skip("trtexec", f"neither on the PATH nor in {TRTEXEC_FOLDER}")
        return
    for name, path in engines.items():
        for batch in check.sizes.batches:
            with check.part(f"trtexec of {name}"):
                shape = f"images:{batch}x{check.sizes.step.height}x{check.sizes.step.width}x3"
                command = [trtexec, f"--loadEngine={path}", f"--shapes={shape}", "--useCudaGraph", "--duration=1"]
                printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                timed = printed.partition("GPU Compute Time: ")[2].partition("median = ")[2].split()[0]
                check.add("trtexec", f"{name}, batch {batch}", {"GPU compute, median, ms": float(timed)})


def compare_methods(check: Check) -> None:
    from gpu_methods import train_all

    train_all(check)


def measure_energy_use(check: Check) -> None:
    """Energy by the counter of the GPU, which updates a few times per second; idle power is included."""
    from train_step import PMM, seconds, step_of

    from pmm_edge.bench import resources
    from pmm_edge.runtime import load

    sizes, step = check.sizes, check.sizes.step
    gpu, table = resources.open_gpu(sizes.device), f"Energy (NVML), {step.backbone} {step.height}x{step.width}"
    if gpu is None or gpu.joules is None:
        check.skip("energy", "NVML has no energy counter of this device")
        return
    with check.part("energy of training"):
        take = step_of(PMM, step, check.device, torch.bfloat16)
        for _ in range(6):
            seconds(take, check.device)
        before, start, images = gpu.joules, time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < sizes.energy_seconds:
            seconds(take, check.device, sizes.steps)
            images += sizes.steps * step.batch
        used = gpu.joules - before
        row = f"training step in bf16, batch {step.batch}"
        check.add(table, row, {"mJ per image": 1000 * used / images, "W": used / elapsed})
    checkpoint, _ = _checkpoint(check)
    for path in [checkpoint, *sorted(check.work.glob("*.engine"))]:
        with check.part(f"energy of {path.name}"):
            embedder, batch = load(path, sizes.device), sizes.batches[-1]
            crops = torch.zeros(batch, step.height, step.width, 3, dtype=torch.uint8).numpy()
            if energy := resources.measure_energy(embedder, crops, sizes.energy_seconds):
                row = f"inference in {embedder.backend} {embedder.spec.precision}, batch {batch}"
                check.add(table, row, {"mJ per image": 1000 * energy.joules_per_embedding, "W": energy.watts})


RUN = {
    "a": describe_machine,
    "b": run_tests,
    "c": measure_training,
    "d": measure_inference,
    "e": measure_engines,
    "f": compare_methods,
    "g": measure_energy_use,
}
