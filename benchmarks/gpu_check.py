"""Check everything on a machine with an NVIDIA GPU, in at most 10 minutes.

    python benchmarks/gpu_check.py                                all stages, into gpu_check/
    python benchmarks/gpu_check.py --stages abcd --limit 400 --wheels wheels/ --output FOLDER
    python benchmarks/gpu_check.py --dry-run                      what would run, and what is missing
    python benchmarks/gpu_check.py --small                        the same code on a CPU, with small sizes

Each stage (in gpu_stages.py) runs in a process of its own with a time limit; time that a stage leaves goes to the later
ones. The output folder gets gpu_check.json (whatever is found is in it a second later), gpu_check.md for the docs and
gpu_check.log. Stages of an earlier run in the same folder are kept unless they run again. The exit code is 1 if a
stage failed or exceeded its limit.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130
STOPPED = {"timeout": "the time limit of the stage", "interrupted": "interrupted"}
"""Status of a stage that was killed -> why it left something out."""
BASE = ("numpy", "PIL", "typer", "rich", "msgspec", "jinja2", "filelock", "pynvml", "onnxruntime", "torch")
TRAINING = (*BASE, "torchvision", "safetensors", "tensorboard", "absl", "tomli_w")  # tensorboard imports absl
QUANTIZATION = ("onnxruntime.quantization", "onnxruntime.transformers")  # which the first one imports
EXPORT = (*BASE, "torchvision", "safetensors", "onnx", "onnxscript", "onnx_ir", *QUANTIZATION)


@dataclass(frozen=True)
class Stage:
    """What a stage does, the seconds that it may take of 600, and the modules that it needs."""

    title: str
    share: int
    needs: tuple[str, ...] = BASE

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if not _is_there(name)]

    @property
    def seconds(self) -> int:
        return 20 if self.missing else self.share  # enough to say what is missing


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:  # the package of a module is missing, or cannot be imported
        return False


STAGES = {
    "a": Stage("machine, driver, versions", 40),
    "b": Stage("pytest -m gpu", 75, (*TRAINING, "pytest", "cloudpickle")),
    "c": Stage("training step beside textbook and floor, then 20 epochs of pmm train", 180, TRAINING),
    "d": Stage("parity and latency of PyTorch and ONNX Runtime CUDA", 60, EXPORT),
    "e": Stage("TensorRT engines: build, precision, parity, latency", 90, (*EXPORT, "tensorrt", "cuda")),
    "g": Stage("energy per image of training and inference", 35, TRAINING),
    "f": Stage("table of methods, long trainings with several seeds", 120, TRAINING),
}
"""In the order in which they run: the first import of torch may be slow, and f can use all that the others leave.

On an H200, a took 9 s, b a few more than 55 s, and c 160 s without the epochs of the compiled network. The shares of
the others are estimates.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="".join(STAGES), help="letters of the stages; default: all")
    parser.add_argument("--limit", type=float, default=600, help="seconds for all stages; default: %(default)s")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the stages get, in a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=100, help="of each training of stage f; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and what is missing")
    parser.add_argument("--child", nargs=3, metavar=("STAGE", "FOLDER", "DEADLINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from gpu_stages import run_stage

        run_stage(options.child[0], Path(options.child[1]), options)
        return
    if set(options.stages) - STAGES.keys() or not options.stages or options.limit <= 0:
        parser.error(f"--stages takes letters of {''.join(sorted(STAGES))}, --limit a positive number")
    deadline = time.monotonic() + options.limit
    stages = {letter: stage for letter, stage in STAGES.items() if letter in options.stages}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu_check-", ignore_cleanup_errors=True) as folder:
        site = Path(folder, "site")
        if options.wheels:
            if not (wheels := sorted(map(str, options.wheels.glob("*.whl")))):
                parser.error(f"{options.wheels} has no wheels")
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(site)]
            subprocess.run([*install, *wheels], check=True)
            sys.path.insert(0, str(site))
        sys.exit(
            plan(options, stages) if options.dry_run else run_stages(options, stages, Path(folder), site, deadline)
        )


def plan(options: argparse.Namespace, stages: dict[str, Stage]) -> int:
    """Print what would run, with the limits if every stage uses its own up, and what is missing."""
    whole = sum(stage.seconds for stage in stages.values())
    for letter, stage in stages.items():
        missing = f"; missing: {', '.join(stage.missing)}" if stage.missing else ""
        print(f"{letter}  {options.limit * stage.seconds / whole:4.0f} s  {stage.title}{missing}")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        print("no NVIDIA driver here: without --small, only stage a finds anything")
    return 0


def run_stages(options: argparse.Namespace, stages: dict[str, Stage], work: Path, site: Path, deadline: float) -> int:
    """Run stages one after the other, each with its share of the time that is left; return the exit code."""
    path = options.output / "gpu_check.json"
    report: dict[str, Any] = {"schema": 1, "stages": {}}
    with suppress(OSError, ValueError):  # stages of an earlier run
        report = json.loads(path.read_text("utf-8"))
    options.output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]  # the package need not be installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if options.small:
        # Compiling for a CPU takes minutes, and the threads of small networks wait for each other.
        environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    shares = [stage.seconds for stage in stages.values()]
    for number, (letter, stage) in enumerate(stages.items()):
        limit = (deadline - time.monotonic()) * shares[number] / sum(shares[number:])
        print(f"stage {letter}, {stage.title}: at most {limit:.0f} s", flush=True)
        begun = time.monotonic()

        def save(found: dict[str, Any], letter: str = letter, title: str = stage.title, begun: float = begun) -> None:
            seconds, date = round(time.monotonic() - begun, 1), datetime.now(timezone.utc).isoformat(timespec="seconds")
            command = shlex.join(["python", *sys.argv])
            about = {"title": title, "command": command, "small": options.small, "date": date, "seconds": seconds}
            report["stages"][letter] = found | about
            write(path, json.dumps(report, indent=1) + "\n")
            write(path.with_suffix(".md"), markdown(report))

        found = run_process(options, letter, work, limit, environment, save)
        save(found)
        print(f"  {found['status']} in {report['stages'][letter]['seconds']:.0f} s", end="")
        print("", *found["errors"], *found["skipped"], sep="\n  ", flush=True)
        if found["status"] == "interrupted":
            return INTERRUPTED
    print(f"written: {path}, {path.with_suffix('.md')}")
    return int(any(report["stages"][letter]["status"] in ("failed", "timeout") for letter in stages))


def run_process(
    options: argparse.Namespace, letter: str, work: Path, limit: float, environment: dict[str, str], save: Any
) -> dict[str, Any]:
    """Run a stage in a process of its own, which leads a group, so that all that it starts can be killed with it."""
    ended = time.monotonic() + limit
    command = [sys.executable, sys.argv[0], "--child", letter, str(work), str(ended)]
    command += ["--epochs", str(options.epochs), *["--small"] * options.small]
    log, partial = options.output / "gpu_check.log", work / f"{letter}.json"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)

    def result(status: str) -> dict[str, Any]:
        found = {"figures": [], "skipped": [], "errors": [], "facts": {}}
        with suppress(OSError, ValueError):
            found = json.loads(partial.read_text("utf-8"))
        part = found.pop("part", None) or "startup"
        if status in STOPPED:
            found["skipped"].append(f"{part} and all that follows: {STOPPED[status]}")
        return {"status": status, "limit": round(limit)} | found

    try:
        while process.poll() is None:
            if time.monotonic() > ended:
                return result("timeout")
            save(result("running"))
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(1.0, max(0.01, ended - time.monotonic())))
    except KeyboardInterrupt:
        return result("interrupted")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = result("ok")
    if process.returncode and not found["errors"]:
        last = (log.read_text("utf-8", "replace").strip().splitlines() or ["no output"])[-1]
        found["errors"].append(f"exit code {process.returncode}: {last}")
    if found["errors"]:
        found["status"] = "failed"
    elif found["status"] == "ok" and found["skipped"] and not found["figures"]:
        found["status"] = "skipped"
    return found


def write(path: Path, text: str) -> None:
    """Write a file atomically. (`pmm_edge.files` may need a wheel that this process does not have.)"""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def markdown(report: dict[str, Any]) -> str:
    """The page: for each stage device, date and command, its tables, and what it skipped or what failed."""
    lines = ["# GPU check", ""]
    for letter, stage in sorted(report["stages"].items()):
        lines += [f"## {letter}: {stage['title']}", "", f"{stage['facts'].get('device', 'CPU')}, {stage['date'][:10]}."]
        lines += [f"`{stage['command']}`: {stage['status']} in {stage['seconds']:.0f} s of {stage['limit']} s.", ""]
        lines += [*(f"- {name}: {value}" for name, value in stage["facts"].items()), ""]
        tables: dict[str, dict[str, dict[str, Any]]] = {}
        for one in stage["figures"]:
            tables.setdefault(one["table"], {}).setdefault(one["row"], {})[one["figure"]] = one["value"]
        for title, rows in tables.items():
            columns = dict.fromkeys(name for row in rows.values() for name in row)
            lines += [f"**{title}**", "", f"| | {' | '.join(columns)} |", f"| --- {'| --- ' * len(columns)}|"]
            lines += [
                f"| {name} | {' | '.join(_cell(row.get(key)) for key in columns)} |" for name, row in rows.items()
            ]
            lines += [""]
        lines += [f"- {kind}: {text}" for kind in ("skipped", "errors") for text in stage[kind]] + [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6f}" if 0.99 < value <= 1 else f"{value:.4g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
