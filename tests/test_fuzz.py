"""Damaged and malicious files of every kind: refused with our error in one line, or read as well as the original.

A process of its own reads them, so that a crash or a hang is a finding. By hand, with a table of results:
`PMM_FUZZ=2000 PMM_FUZZ_SEED=1 nice pytest tests/test_fuzz.py -rP` (mutations of all files together, and their seed).
"""

import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.report_sample import passing_report
from certify import certify
from color_network import color_network
from PIL import Image
from trainer.tiny_training import CONFIG
from trt import double

import pmm_edge
from pmm_edge.cli import main
from pmm_edge.errors import PmmError
from pmm_edge.export.tensorrt import build_engine
from pmm_edge.images import read_crop
from pmm_edge.runtime.certificate import check_certificate

COUNT, SEED = int(os.environ.get("PMM_FUZZ", 360)), os.environ.get("PMM_FUZZ_SEED", "0")
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["tiny_training", "pmm_edge.cli", "pmm_edge.trainer.train", "pmm_edge.export.exporter"])


def embed(path: Path) -> bytes:
    crops = np.random.default_rng(0).integers(0, 256, (2, 96, 64, 3), np.uint8)
    return pmm_edge.load(path, None if path.suffix == ".engine" else "cpu").embed(crops).tobytes()


def run(*arguments: object) -> None:
    """Run a command: it prints nothing that controls a terminal, and if it fails, its last line is our error."""
    sys.argv = ["pmm", *map(str, arguments)]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as end:
        main()
    printed = out.getvalue() + err.getvalue()
    assert not re.search(r"[^\n -~\xa0-\ud7ff\ue000-\U0010ffff]", printed), printed
    if end.value.code:
        assert end.value.code in (1, 2) and re.search(r"^error: .*\n\Z", printed, re.MULTILINE), printed
        raise PmmError(printed.splitlines()[-1])


def resume(path: Path) -> None:
    if path.suffix == ".pkl":  # with the right checksums, as an attacker writes them
        with zipfile.ZipFile(path.with_name("old.pt")) as old, zipfile.ZipFile(path.with_name("last.pt"), "w") as new:
            for name in old.namelist():
                new.writestr(name, path.read_bytes() if name.endswith(path.name) else old.read(name))
    run("train", "--resume", path.parent)


READERS: dict[str, Callable[[Path], object]] = {
    "best.pt": embed,
    "model.onnx": embed,
    "model.safetensors": embed,
    "color.onnx": lambda path: embed(path) and None,
    "color.engine": embed,
    "color.manifest.json": lambda path: embed(path.with_name("color.engine")),
    "certified.onnx.certificate.json": lambda path: check_certificate(path.with_name("certified.onnx")),
    "bench.json": lambda path: run("bench", "--compare", path, path),
    "config.toml": lambda path: run("train", "--config", path, "--print-config"),
    "images.txt": lambda path: run("embed", path.with_name("color.onnx"), path, "-o", path.with_name("out.npz")),
    "people.csv": lambda path: run("data", path),
    **dict.fromkeys(("run.json", "metrics.jsonl", "last.pt", "data.pkl"), resume),
    **{f"image.{kind}": lambda path: read_crop(path, 96, 64).mean() < 0 for kind in ("jpeg", "png", "bmp", "webp")},
}
"""The files that are mutated, and what reads them: it must return what it returns for the original."""


@pytest.fixture(scope="module")
def originals(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "original"
    pmm_edge.train(tiny_dataset, config=CONFIG, out=folder)
    with zipfile.ZipFile(shutil.copy(folder / "last.pt", folder / "old.pt")) as archive:
        (folder / "data.pkl").write_bytes(archive.read(archive.namelist()[0]))
    pmm_edge.export(folder / "best.pt", out=folder / "model.onnx", safetensors=True)
    certify(color_network(folder / "certified.onnx"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PMM_HOME", str(folder))
        for module, double_of_it in gpu().items():
            patch.setitem(sys.modules, module, double_of_it)
        build_engine(color_network(folder / "color.onnx"), folder / "color.engine")
    passing_report(folder).save(folder / "bench.json")
    (folder / "images.txt").write_text("image.png\nimage.bmp\n")
    rows = ("path,pid,camid,split", "image.png,1,1,train", "image.bmp,2,1,query", "image.webp,2,2,gallery")
    (folder / "people.csv").write_text("\n".join(rows))
    for kind in ("jpeg", "png", "bmp", "webp"):
        Image.effect_noise((40, 90), 50).convert("RGB").save(folder / f"image.{kind}", exif=b"Exif\0\0" + bytes(99))
    return folder


def gpu() -> dict[str, object]:
    one = double.FakeGpu()
    return {"tensorrt": double.tensorrt(one), "cuda.bindings.runtime": double.cuda_runtime(one)}


@pytest.mark.parametrize("name", READERS)
def test_mutated_files(name: str, originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    outcomes, count = list[str](), -(-COUNT // len(READERS))
    with CLEAN.Pool(1) as pool:
        results = pool.imap(partial(read_mutant, tmp_path, name, (originals / name).read_bytes()), range(count))
        with suppress(multiprocessing.TimeoutError):  # also if the process died
            outcomes += (results.next(timeout=60) for _ in range(count))
    outcomes += ["crash or hang:"] * (len(outcomes) < count)
    sys.stdout.write(f"{name} {dict(Counter(outcome.partition(':')[0] for outcome in outcomes))}\n")
    found = [f"{number} {outcome}" for number, outcome in enumerate(outcomes) if ":" in outcome]
    assert not found, f"{len(found)} of {count} with seed {SEED}\n" + "\n".join(found)


@cache
def expected(path: Path) -> object:
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30,) * 2)  # a few MB need no more
    torch.set_num_threads(1)
    sys.modules.update(gpu())
    return READERS[path.name](path)


def read_mutant(folder: Path, name: str, content: bytes, number: int) -> str:
    """Read one mutant, and return what became of it; what has a colon is a finding."""
    right = expected(folder / name)
    (folder / name).write_bytes(mutant(content, random.Random(f"{SEED} {name} {number}")))
    try:
        return "same" if READERS[name](folder / name) == right else "accepted though different:"
    except PmmError as error:
        return "refused" if error.exit_code in (1, 2) and "\n" not in str(error) else f"several lines: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error} in {traceback.extract_tb(error.__traceback__)[-1]}"


# Values in JSON and TOML, also in the spec that a binary file contains, and what nothing expects in their place
TOKEN = re.compile(rb"""(?<=[:,\[ =\n{])(?:"[^"\n]{0,80}"|-?\d[\d.e+-]*|true|false|null)(?=[,:\]}\s])""")
STRANGE = rb'0 -1 1e9 [] {} "" null true 3e38 1e-320 "../.." nan 1e999 "\u001b\u000a\u0000" "\ud800" {"a":{}}'.split()
STRANGE += [b'"\x1b[31m"', b"9" * 18, b"9" * 6000, b'"' + b"x" * 70_000 + b'"', b"[" * 500 + b"]" * 500, b"[" * 100_000]


def mutant(content: bytes, choose: random.Random) -> bytes:
    data, size, kind = bytearray(content), len(content), choose.randrange(10)
    start, other = (choose.randrange(choose.choice((size, min(size, 4096)))) for _ in range(2))
    length = choose.choice((1, 4, 256, 4096, size // 4))
    block, tokens = data[start : start + length], list(TOKEN.finditer(content))
    if kind < 4 and tokens:
        token = choose.choice(tokens)
        strange = choose.choice([value for value in STRANGE if len(value) <= len(token[0]) or b"\0" not in content])
        data[slice(*token.span())] = strange.ljust(len(token[0]))  # in a binary file, the length must not change
    elif kind < 6:
        for _ in range(choose.choice((1, 2, 20))):
            data[(start + choose.randrange(length + 1)) % size] = choose.randrange(256)
    elif kind == 6:
        del data[start:]
    elif kind < 9:
        data[other : other + choose.choice((0, length))] = choose.choice((block, bytes(length)))
    else:
        data[start : start + length], data[other : other + length] = data[other : other + length], block
    return bytes(data)
