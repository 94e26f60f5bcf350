"""Wrong use of each command is one line that names the value or the remedy, and is refused before the work."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

TRAIN = "train data --out run --height 96 --width 64 --epochs 1 --batch 8 --erase-size 8 --device cpu "
SYNTH = "synth set --train-identities 2 --test-identities 1 --cameras 2 --images 2 --workers 1 "
EVAL, EMBED, VISUALIZE = "eval model.onnx data ", "embed model.onnx data ", "visualize --device cpu "
WRONG_USE = {
    # what other tools call an option, and names that do not exist
    "train --imgsz 256": "--height",
    "export --half": "--precision fp16",
    "export --int8": "--precision int8",
    "export --format engine": "--trt",
    "export --input raw": "--input-form",
    "bench --batch-size 8": "--batch-sizes",
    "train --lr0 0.1": "--lr",
    "train --nonsense": "-h",
    "nonsense": "-h",
    # train
    "train nowhere --out run": "nowhere",
    "train data data --out run": "named twice",
    TRAIN + "--layout folders": "not people",
    TRAIN + "--mix-block-size 3x2 --height 100": "multiples of 48",
    TRAIN + "--device cuda:63": "cuda:63",
    TRAIN + "--device 63": "63",
    TRAIN + "--device tpu9": "tpu9",
    TRAIN + "--backbone vgg": "resnet10",
    TRAIN + "--backbone mobilenet_v3_smal": "Did you mean 'mobilenet_v3_small'",
    TRAIN + "--backbone mobilenet_v3_small --method cama": "Choose a ResNet",
    TRAIN + "--embedding-size 256 --method pcb": "--embedding-size",
    TRAIN + "--backbone-weights imagnet": "Did you mean 'imagenet'",
    TRAIN + "--precision fp16": "bf16 or fp32",
    TRAIN + "--precision fp17": "fp16",
    TRAIN + "--batch 7": "multiple of 2",
    TRAIN + "--preset quik": "Did you mean 'quick'",
    TRAIN + "--resume runs": "Leave out",
    TRAIN + "--teacher missing.pt": "missing.pt",
    TRAIN + "--teacher lone.pt --method pmm": "--method baseline",
    TRAIN + "--out /proc/run": "/proc/run",
    "train --resume runs --print-config": "runs",
    # export
    "export short.pt": "short.pt",
    "export file": "file",
    "export missing.pt": "missing.pt",
    "export lone.pt --out model": ".onnx",
    "export lone.pt --out blocked.onnx": "cannot write blocked.onnx: ",
    "export lone.pt --safetensors --out taken.onnx": "cannot write taken.safetensors: ",
    "export lone.pt --trt --out built.onnx": "cannot write built.engine: ",
    "export lone.pt --out /proc/model.onnx": "cannot write /proc/model.onnx",
    "export lone.pt --target cpu": "--precision int8",
    "export lone.pt --batch-profile 1,2,3": "--trt",
    "export lone.pt --gpu sm86": "--rtx",
    "export lone.pt --rtx --trt": "--rtx",
    "export lone.pt --rtx --gpu sm86,sm90": "sm90",
    # bench, verify
    "bench --batch-sizes 1;8": "--batch-sizes 1,8",
    "bench model.onnx --reference lone.pt": "--data",
    "bench --data none": "none",
    "bench --min-cosine 2": "min_cosine",
    "bench --out file/bench.json": "file/bench.json",
    "bench --out bench.html": ".json",
    "bench bare.onnx": "bare.onnx",
    "bench --compare absent.json absent.json": "absent.json",
    "verify missing.onnx": "missing.onnx",
    "verify model.onnx --data none": "none",
    "verify data": "data is a folder",
    # eval, embed, visualize
    "eval missing.onnx data": "missing.onnx",
    "eval missing data": "it does not exist",
    "eval missing.engine data": "pmm export missing.onnx --trt",
    "eval model.onnx none": "none",
    EVAL + "--layout market150": "Did you mean 'market1501'?",
    EVAL + "--device 63": "63",
    EVAL + "--device npu": "npu",
    EVAL + "--cmc cmc.jpg": "cannot write cmc.jpg: its name must end in .png or .svg",
    EVAL + "--cmc file/cmc.png": "cannot write file/cmc.png: file is a file",
    EVAL + "none": "none",
    EVAL + "people.csv": "row 2 of people.csv names missing.jpg",
    EVAL + "data --cmc cmc.png": "--cmc",
    EVAL + "--features features.npy": ".npz",
    EVAL + "--features blocked.npz": "cannot write blocked.npz: it is a folder",
    EVAL + "--tracklets": "data has no tracklets",
    "eval lone.pt data --device 63": "63",
    "calibrate missing.pt data": "missing.pt",
    "calibrate lone.pt": "data set",
    "calibrate model.onnx none": "none",
    "calibrate model.onnx data": "needs 1,000",
    "calibrate model.onnx data -o t.jpg": ".png or .svg",
    "match model.onnx a.jpg b.jpg": "pmm calibrate",
    "match model.onnx a.jpg": "IMAGE",
    "match missing.onnx a.jpg b.jpg": "missing.onnx",
    "match model.onnx a.jpg b.jpg --distance manhattan": "manhattan",
    "embed data data": "best.pt",
    EMBED + "-o e.csv": ".npz or .parquet",
    EMBED + "-o file/shards": "cannot write file/shards",
    EMBED + "-o data": "data exists and is not an empty folder",
    EMBED + "-o e.npz --shard-rows 9": "--shard-rows is for a folder",
    EMBED + "-o shards --tracklets": "--tracklets",
    EMBED + "-o e.npz --ray auto": "--ray is for a folder",
    EMBED + "-o s9://bucket/shards": "s9://bucket/shards",
    EMBED + "-o shards --shard-rows 0": "1 or more",
    EMBED + "--layout market": "market",
    EMBED + "-o file/x.npz": "cannot write file/x.npz",
    EMBED + "--tracklets": "data has no tracklets",
    VISUALIZE + "model.onnx --what cams --data data": "checkpoint",
    VISUALIZE + "missing.pt --data data": "missing.pt",
    VISUALIZE + "--what cams --data none": "none",
    VISUALIZE + "--what galleries --data data/query": "--data",
    VISUALIZE + "--images 0": "1 to 100",
    VISUALIZE + "--out file/pictures": "cannot write file/pictures",
    VISUALIZE + "lone.pt": "--data",
    # synth, data, doctor
    SYNTH + "--cameras 1": "2 to 9",
    SYNTH + "--images 99": "2 to 32",
    SYNTH + "--frames 0": "1 to 99",
    "synth data": "data",
    "data none": "none",
    "data data --layout market1502": "Did you mean 'market1501'?",
    "doctor embd": "Did you mean 'embed'?",
}


@pytest.fixture
def folder(run: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run, its files outside of it, what blocks outputs, and no function that does the work."""
    here = Path.cwd()
    (here / "data").symlink_to(tiny_dataset)
    shutil.copy(run / "best.pt", "lone.pt")
    shutil.copy(run / "export/model.onnx", "model.onnx")
    bare = onnx.load("model.onnx")
    del bare.metadata_props[:]
    onnx.save(bare, "bare.onnx")
    (here / "short.pt").write_bytes((run / "best.pt").read_bytes()[:5000])
    (here / "file").write_text("weights")
    (here / "people.csv").write_text("path,pid,camid,split\nmissing.jpg,1,1,train\n")
    for blocked in ("blocked.onnx", "taken.safetensors", "built.engine", "blocked.npz"):
        (here / blocked).mkdir()
    monkeypatch.setattr(sys.modules["pmm_edge.runtime.embed_files"], "ahead", None)
    monkeypatch.setattr("pmm_edge.export.graph.onnx_graph", None)
    return here


@pytest.mark.parametrize("arguments", [(), ("gallery",)])
def test_without_a_command_the_help_is_printed(pmm: Callable, arguments: tuple[str, ...]) -> None:
    ended = pmm(*arguments)
    assert (ended.exit_code, ended.stderr) == (2, "")
    assert "Usage" in ended.stdout


def test_wrong_use(folder: Path, pmm: Callable) -> None:
    before = sorted(folder.rglob("*"))
    for arguments, reason in WRONG_USE.items():
        assert reason in pmm(*arguments.split()).error, arguments
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree("runs/one/export")
    assert "pmm export" in pmm("bench").error
    shutil.rmtree("runs")
    (folder / "lone.pt").unlink()
    assert "--reference" in pmm("bench", "model.onnx", "--data", "data").error
    for command in ("export", "visualize"):
        assert "pmm train" in pmm(command).error
