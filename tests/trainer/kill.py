"""Kill commands with SIGKILL at random moments, start them again, and check that nothing is lost, half-written or left.

    python tests/trainer/kill.py --kills 100 --seed 0

The commands train (in one process and in two), export, bench and embed with a tiny network. Half of the kills come at a
random moment, the others in the next write of a file; of two processes, one or both are killed. After a kill, every
file under its final name must be whole. Once the next start (which may be killed too) has finished, nothing temporary
may be left, and the results must be those of an undisturbed run, bit by bit. Exit code 1 if anything is wrong.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import tiny_training
from torch.distributed import TCPStore

from pmm_edge.cli import main as pmm
from pmm_edge.data.synthetic import SyntheticConfig, make_synthetic
from pmm_edge.model import load_checkpoint

DATA = SyntheticConfig(train_identities=12, test_identities=4, cameras=3, images=4, height=48, width=32)
CONFIG = replace(tiny_training.CONFIG, batch=16, evaluate_every=1)
MODULES = "pmm_edge.export.exporter", "pmm_edge.export.graph", "pmm_edge.export.quantize", "pmm_edge.bench.pipeline"


@dataclass
class Case:
    """A command that runs in a folder with copies of `needs`."""

    command: str
    needs: tuple[Path, ...] = ()
    processes: int = 1
    seconds: float = 0.0  # that an undisturbed run takes

    def new_folder(self, root: Path) -> Path:
        shutil.rmtree(root, ignore_errors=True)
        (root / "work/tmp").mkdir(parents=True)
        for path in self.needs:
            shutil.copy(path, root / "work")
        return root / "work"

    def start(self, folder: Path) -> list[BaseProcess]:
        shutil.rmtree(folder / "deepstream", ignore_errors=True)  # is whole, but a second export refuses it
        command = "train --resume run" if (folder / "run/config.toml").exists() else self.command
        environments = [{"TMPDIR": str(folder / "tmp")} for _ in range(self.processes)]
        if self.processes > 1:  # as torchrun does
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            for rank, each in enumerate(environments):
                each |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"}

        def work() -> None:
            os.chdir(folder)
            tempfile.tempdir = os.environ["TMPDIR"]
            sys.argv = ["pmm", *command.split()]
            pmm()

        return [tiny_training.start(work, folder.with_name(f"{n}.txt"), **each) for n, each in enumerate(environments)]

    def finish(self, folder: Path) -> dict[str, object]:
        began, codes = time.monotonic(), [tiny_training.wait(process) for process in self.start(folder)]
        self.seconds = self.seconds or time.monotonic() - began
        assert not any(codes) and not left(folder), (codes, left(folder), folder.with_name("0.txt").read_text()[-3000:])
        return results(folder)

    def kill(self, folder: Path, choice: random.Random) -> str:
        """Start the command and kill it; return the moment, or an empty text if it finished before."""
        began, moment, in_write = time.monotonic(), choice.uniform(0, self.seconds), choice.random() < 0.5
        victims, known = choice.choice([[0], [-1], list(range(self.processes))]), left(folder)
        processes, when = self.start(folder), ""
        while not when and all(process.is_alive() for process in processes):
            seconds, writes = time.monotonic() - began, left(folder) - known if in_write else set()
            if seconds > moment and (writes or not in_write):
                when = f"{seconds:.2f} s" + "".join(f" ({path.name})" for path in writes)
                for victim in victims:
                    processes[victim].kill()
                for process in processes:  # torchrun gives the others 30 s
                    process.terminate()
                    process.join(30)
                    process.kill()
            time.sleep(0.0002)
        for process in processes:
            process.join()
        return when


def left(folder: Path) -> set[Path]:
    """What is temporary: files and folders of such a name, and all in TMPDIR."""
    return {*folder.rglob(".*.tmp"), *(folder / "tmp").iterdir()}


def results(folder: Path) -> dict[str, object]:
    """Read all files under final names, and raise if one is not whole; return what two runs have in common."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir() or re.search(r"(^tmp|\.tmp|tensorboard)(/|$)", name):
            continue
        found[name] = None
        if path.suffix == ".pt":
            load_checkpoint(path)
        elif path.suffix == ".npz":
            found[name] = {key: array.tobytes() for key, array in np.load(path).items()}
        elif path.suffix == ".json":
            found[name] = [(one["parity"], one["failures"]) for one in json.loads(path.read_text()).get("models", [])]
        elif path.suffix not in (".jsonl", ".lock", ".md", ".html") and path.name != "log.txt":
            found[name] = path.read_bytes()
        assert path.suffix != ".html" or path.read_text().rstrip().endswith("</html>"), path
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    tiny_training._CLEAN.set_forkserver_preload(["tiny_training", "pmm_edge.trainer.train", *MODULES])
    choice, count, wrong = random.Random(given.seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        root, data, settings = Path(name), Path(name, "data"), Path(name, "settings.toml")
        make_synthetic(data, DATA, workers=1)
        settings.write_text(CONFIG.to_toml())
        train = f"train {data} --config {settings} --out run"
        calibration = f"--calibration {data} --calibration-method minmax"
        best, model = root / "0/work/run/best.pt", root / "2/work/m.onnx"
        cases = [
            Case(train),
            Case(train, processes=2),
            Case("export best.pt --out m.onnx --safetensors --deepstream deepstream", (best,)),
            Case(f"export best.pt --out m.onnx --precision int8 {calibration}", (best,)),
            Case(f"bench m.onnx --reference best.pt --data {data} --parity-only --out bench.json", (best, model)),
            Case(f"embed m.onnx {data} --out embeddings.npz", (model,)),
            Case(f"embed m.onnx {data} --out shards --shard-rows 8 --batch 4", (model,)),
        ]
        tiny_training.wait(tiny_training.start(int, root / "loaded.txt"))  # no case waits for the modules
        undisturbed = [(case, case.finish(case.new_folder(root / str(n)))) for n, case in enumerate(cases)]
        while count < given.kills:
            case, expected = choice.choices(undisturbed, [6, 6, 2, 1, 3, 3, 3])[0]  # exports take the longest
            moments, outcome, folder = list[str](), "ok", case.new_folder(root / "killed")
            try:
                while count < given.kills and (moment := case.kill(folder, choice)):
                    count, moments = count + 1, [*moments, moment]
                    for key, value in results(folder).items():
                        assert value == expected.get(key, value), f"{key} is not whole"
                    if choice.random() < 0.5:
                        break
                assert case.finish(folder) == expected, "not the files of an undisturbed run"
                if case.command == train:
                    tiny_training.assert_same_run(root / f"{cases.index(case)}/work/run", folder / "run")
            except Exception as error:
                wrong, outcome = wrong + 1, f"WRONG: {type(error).__name__}: {error}"
            moments = [f"{count}/{given.kills} {case.command[:14]} in {case.processes}", *moments]
            sys.stderr.write(f"{', '.join(moments)}: {outcome}\n")
    sys.stderr.write(f"{count} kills, seed {given.seed}: {wrong} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
