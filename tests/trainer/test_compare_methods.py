"""The comparison of methods as a user runs it: what it trains, what it finds again, what stops it."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from pmm_edge.trainer import train

# fmt: off
TINY = [
    "--dtype", "fp32", "--epochs", 1, "--seeds", 0, "--set", "height=96", "--set", "width=64", "--set", "batch=8",
    "--set", "erase_size=8", "--set", "device=cpu",
]
# fmt: on


@pytest.fixture
def compare(monkeypatch, capsys, tiny_dataset, tmp_path):
    """Run the script in a process that is interrupted as any other is."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import compare_methods

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments):
        flags = [tiny_dataset, "--out", tmp_path / "out", *TINY, *arguments]
        monkeypatch.setattr(sys, "argv", ["compare_methods.py", *map(str, flags)])
        with pytest.raises(SystemExit) as ended:
            compare_methods.main()
        return ended.value.code, *capsys.readouterr()

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def trainings(monkeypatch):
    """The method, mix and seed of each evaluation: two in each of these trainings."""
    seen = []
    evaluate = train.Run._evaluate

    def recorded(run, *arguments):
        seen.append((run.config.method, run.config.mix, run.config.seed))
        return evaluate(run, *arguments)

    monkeypatch.setattr(train.Run, "_evaluate", recorded)
    return seen


def test_a_row_of_both_tables_is_trained_once_and_found_again(compare, trainings, tmp_path):
    code, printed, _ = compare("--methods", "pmm,A-Hard-Mix")
    assert code == 0 and trainings == [("pmm", "a-hard-mix", 0)] * 2
    rows = [line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")]
    assert rows == ["PMM", "A-Hard-Mix"], "only what was trained"
    headings = next(line for line in printed.splitlines() if line.startswith("┃"))
    assert [heading.strip() for heading in headings.strip("┃").split("┃")] == ["", "seeds", "Rank-1", "mAP", "mAP@50"]
    assert compare("--methods", "PMM,none")[0] == 0
    assert trainings[2:] == [("pmm", "none", 0)] * 2
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("result.json")]
    assert len(results) == 2 and all(result["epochs"] == 1 for result in results)
    shown = [[cell.strip() for cell in line.split("│")[3:6]] for line in printed.splitlines() if line.startswith("│")]
    assert shown[0] in [[f"{100 * result[name]:.1f}" for name in ("Rank-1", "mAP", "mAP@50")] for result in results]


def test_a_data_set_s_layout_can_be_named(compare, tmp_path):
    code, _, _ = compare("--methods", "baseline", "--layout", "market1502")
    assert "Did you mean 'market1501'?" in str(code)
    assert compare("--methods", "baseline", "--layout", "dukemtmc-reid")[0] == 0
    (run,) = (tmp_path / "out").rglob("run.json")
    assert json.loads(run.read_text())["layout"] == "dukemtmc-reid"


def test_every_setting_and_the_images_decide_the_folder(compare, monkeypatch, tiny_dataset, tmp_path):
    import compare_methods

    def folder(data, *arguments):
        monkeypatch.setattr(sys, "argv", ["compare_methods.py", str(data), *map(str, arguments)])
        return compare_methods.planned().folder

    fewer = shutil.copytree(tiny_dataset, tmp_path / tiny_dataset.name)
    next((fewer / "bounding_box_train").iterdir()).unlink()
    plain = folder(tiny_dataset)
    assert folder(tiny_dataset, "--methods", "PMM", "--seeds", 5) == plain, "these are told apart inside"
    others = [["--set", "weight_decay=0"], ["--dtype", "bf16"], ["--epochs", 3], ["--set", "mix_blocks=2"]]
    folders = {plain, folder(fewer), *(folder(tiny_dataset, *arguments) for arguments in others)}
    assert len(folders) == 6


def test_an_interruption_in_a_training_s_last_evaluation_stops_the_comparison(compare, monkeypatch, trainings):
    judge = train.Run._judge

    def interrupted(run, *arguments):
        judged = judge(run, *arguments)
        os.kill(os.getpid(), signal.SIGINT)  # too late to stop this training, which has finished
        return judged

    monkeypatch.setattr(train.Run, "_judge", interrupted)
    code, _, said = compare("--methods", "baseline,BDB")
    assert code == 130 and "goes on from here" in said
    assert {method for method, _, _ in trainings} == {"baseline"}

    monkeypatch.setattr(train.Run, "_judge", judge)
    code, printed, _ = compare("--methods", "baseline,BDB")
    assert code == 0 and "baseline" in printed and "BDB" in printed


def test_an_interruption_between_two_trainings_prints_what_there_is(compare, monkeypatch):
    original = train.train
    started = []

    def interrupted(config, *arguments, **named):
        started.append(config.method)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(config, *arguments, **named)

    monkeypatch.setattr("compare_methods.train", interrupted)
    code, printed, _ = compare("--methods", "baseline,BDB")
    assert code == 130 and "baseline" in printed and "│ BDB" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "PMN"], "Did you mean 'pmm'"),
        (["--set", "epoch=3"], "Did you mean 'epochs'"),
        (["--set", "epochs=many"], "must be of type int"),
        (["--set", "method=bdb"], "Use --preset, --methods or --seeds"),
        (["--set", "erase_size=0", "--methods", "PMM,CutOut"], "CutOut is the erasing"),
        (["--seeds", "a"], "Write numbers"),
    ],
)
def test_wrong_use_is_one_line_before_anything_is_trained(compare, tmp_path, arguments, message):
    code, _, _ = compare(*arguments)
    assert message in str(code)
    assert not (tmp_path / "out").exists()
