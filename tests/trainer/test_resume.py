"""Resuming: exact after a signal or a kill at any moment, refused if the settings or the data have changed."""

import errno
import os
import shutil
import signal
from dataclasses import replace

import pytest
from tiny_training import CONFIG, assert_same_run, journal, start, wait

from pmm_edge.errors import DataError, ModelError, OutputError, PmmError, PmmWarning
from pmm_edge.model import load_checkpoint, save_checkpoint
from pmm_edge.runs import about_run, data_of
from pmm_edge.runtime.listing import find_images
from pmm_edge.trainer import logging
from pmm_edge.trainer import train as train_file
from pmm_edge.trainer.state import run_lock
from pmm_edge.trainer.train import train


@pytest.fixture
def killed(tiny_dataset, tmp_path):
    """The folder of a run that was killed with SIGKILL when `moment` came for the `number`th time."""

    def run(moment, number):
        left = [number]

        def passed(what):
            left[0] -= what == moment
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def work():
            fsync = os.fsync
            os.fsync = lambda file: (passed("file written"), fsync(file))
            logging.REPORT_SECONDS = 0.0
            train_file.SAVE_SECONDS = float("inf")
            train(tiny_dataset, config=CONFIG, out=tmp_path / "run", report=lambda what, *_: passed(what))

        assert wait(start(work, tmp_path / "output.txt")) == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("moment", "number", "reached"),
    [
        ("embed", 1, None),  # before the first checkpoint: the run starts again
        ("train", 5, (2, 0, 2)),  # the first step of epoch 3
        ("embed", 8, (4, 0, 2)),  # in the third evaluation
        ("file written", 5, (2, 0, 0)),  # in the second file of the first evaluation, last.pt or best.pt
    ],
    ids=["start", "step", "evaluation", "checkpoint"],
)
def test_a_killed_run_resumes_to_the_same_bits(whole, killed, moment, number, reached):
    folder = killed(moment, number)
    if reached:
        position = load_checkpoint(folder / "last.pt").training["position"]
        assert (position["epoch"], position["step"], position["evaluated"]) == reached
        last = load_checkpoint(folder / "last.pt")  # as after pmm calibrate: the weights will be others
        save_checkpoint(folder / "last.pt", replace(last, spec=replace(last.spec, checkpoint_sha256="a" * 64)))
    else:
        assert not list(folder.glob("*.pt"))
    assert train(resume=folder).finished
    assert_same_run(whole.folder, folder)
    assert not list(folder.glob(".*.tmp"))


def test_a_run_killed_before_its_settings_were_written_gives_its_folder_back(killed, tiny_dataset):
    folder = killed("file written", 2)
    with pytest.raises(ModelError) as caught:
        train(resume=folder)
    assert f"--out {folder}" in caught.value.remedy
    assert train(tiny_dataset, config=replace(CONFIG, epochs=1), out=folder).finished
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("what", "count", "number", "epochs"),
    [("step", 3, signal.SIGINT, 1), ("train", 4, signal.SIGTERM, 2), ("embed", 4, signal.SIGTERM, 2)],
)
def test_an_interrupted_run_saves_and_resumes_to_the_same_bits(
    whole, tiny_dataset, tmp_path, monkeypatch, what, count, number, epochs
):
    events, rate = [], train_file.learning_rate

    def report(event, *_):
        events.append(event)
        if event == what and events.count(what) == count:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(logging, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(train_file, "learning_rate", lambda *arguments: (report("step"), rate(*arguments))[1])
    stopped = train(tiny_dataset, config=CONFIG, out=tmp_path / "run", report=report)
    assert not stopped.finished and stopped.stop_requested and stopped.epochs_done == epochs
    assert events.count(what) == count, "nothing runs after the batch or step in which the signal came"
    step = load_checkpoint(tmp_path / "run" / "last.pt").training["position"]["step"]
    assert step == (1 if what == "step" else 0)
    finished = train(resume=tmp_path / "run")
    assert finished.finished and (finished.best, finished.before) == (whole.best, whole.before)
    assert_same_run(whole.folder, finished.folder)


@pytest.mark.parametrize("settings", [{"method": "pcb", "rpp": True}, {"method": "aos"}, {"method": "cama"}])
def test_every_method_resumes_to_the_same_bits(tiny_dataset, tmp_path, monkeypatch, settings):
    """Interrupted in the first step of epoch 3, which trains only the part classifier of PCB, after AOS is measured."""
    config, steps, rate = replace(CONFIG, **settings), [], train_file.learning_rate
    whole = train(tiny_dataset, config=config, out=tmp_path / "whole")

    def counted(*arguments):
        steps.append(arguments)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(*arguments)

    monkeypatch.setattr(logging, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(train_file, "learning_rate", counted)
    stopped = train(tiny_dataset, config=config, out=tmp_path / "run")
    assert not stopped.finished and stopped.epochs_done == 2
    assert train(resume=stopped.folder).finished
    assert_same_run(whole.folder, stopped.folder)


@pytest.fixture
def short(tiny_dataset, tmp_path):
    """A data set of its own, and a finished run of one epoch."""
    data = shutil.copytree(tiny_dataset, tmp_path / "data")
    return data, train(data, config=replace(CONFIG, epochs=1), out=tmp_path / "run").folder


def test_only_the_run_s_own_settings_are_accepted(short, tmp_path):
    _, folder = short
    for settings in ({"epochs": 3}, {"preset": "quick"}, {"config": CONFIG}, {"out": tmp_path / "other"}):
        with pytest.raises(PmmError):
            train(resume=folder, **settings)
    older = load_checkpoint(folder / "last.pt")  # of a version without a setting
    del older.training["config"]["rpp"]
    save_checkpoint(folder / "last.pt", older)
    assert train(resume=folder).finished
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("seed = 0", "seed = 7"))
    with pytest.raises(ModelError) as caught:
        train(resume=folder)
    assert "seed: 7, was 0" in caught.value.problem


def test_changed_training_images_are_refused_and_a_replaced_gallery_image_is_not(short):
    data, folder = short
    image, gallery = (next((data / name).iterdir()) for name in ("bounding_box_train", "bounding_box_test"))
    whole = image.read_bytes()
    gallery.write_bytes(gallery.read_bytes() + b"repaired")
    for change in (lambda: image.write_bytes(whole + b"changed"), image.unlink):
        change()
        with pytest.raises(DataError) as caught:
            train(resume=folder)
        assert f"--init-from {folder}/last.pt" in caught.value.remedy
    image.write_bytes(whole)
    assert train(resume=folder).finished


def test_a_moved_data_set_is_found_at_its_new_place(short, tmp_path):
    data, folder = short
    moved, other = tmp_path / "moved", shutil.copytree(data, tmp_path / "other")
    next((other / "bounding_box_train").iterdir()).unlink()
    data.rename(moved)
    with pytest.raises(DataError) as caught:
        train(resume=folder)
    assert f"pmm train NEWPLACE --resume {folder}" in caught.value.remedy
    with pytest.raises(DataError):
        train(other, resume=folder)
    assert about_run(folder).data == str(data)
    assert train(moved, resume=folder).finished
    assert about_run(folder).data == str(moved)
    assert load_checkpoint(folder / "last.pt").spec.dataset == "data", "the name that the run knows it by"


def test_several_data_sets_are_trained_on_together_and_resumed(tiny_dataset, tmp_path):
    people, other = tmp_path / "people", shutil.copytree(tiny_dataset, tmp_path / "other")
    for path in tiny_dataset.glob("bounding_box_train/*"):
        (people / path.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, people / path.name[:4] / path.name[4:])
    settings = {"config": replace(CONFIG, epochs=1), "out": tmp_path / "run"}
    with pytest.raises(DataError, match="twice"):
        train([tiny_dataset, tiny_dataset], **settings)
    with pytest.warns(PmmWarning, match="half of the people"):
        folder = train([tiny_dataset, str(people), other], **settings).folder
    spec = load_checkpoint(folder / "best.pt").spec
    assert (spec.dataset, spec.num_classes) == ("tiny+people+other", 4 + 2 + 4)
    about = about_run(folder)
    assert (about.data, about.layout) == (str(tiny_dataset), "market-layout")
    assert about.more == [(str(people), "folders"), (str(other), "market-layout")]
    assert data_of(folder / "best.pt") == (tiny_dataset, "market-layout")
    moved = people.rename(tmp_path / "moved")
    with pytest.raises(DataError) as caught:
        train(resume=folder)
    assert f"pmm train NEWPLACE NEWPLACE NEWPLACE --resume {folder}" in caught.value.remedy
    with pytest.raises(PmmError, match="3 data sets, not 1"):
        train(tiny_dataset, resume=folder)
    with pytest.raises(DataError, match="not people"):  # each is read by its layout
        train([tiny_dataset, other, moved], resume=folder)
    assert train([tiny_dataset, moved, other], resume=folder).finished
    assert about_run(folder).more[0] == (str(moved), "folders")


def test_a_run_on_folders_of_people_is_evaluated_on_their_people_by_later_commands(tiny_dataset, tmp_path):
    people = tmp_path / "people"
    for path in tiny_dataset.glob("bounding_box_train/*"):
        (people / path.name[:4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, people / path.name[:4] / path.name[4:])
    with pytest.warns(PmmWarning, match="half of the people"):
        folder = train(people, config=replace(CONFIG, epochs=1), out=tmp_path / "run", layout="folders:c(.)s").folder
    assert about_run(folder).layout == "folders:c(.)s"
    assert find_images(*data_of(folder / "best.pt")).dataset.train.identities == 2
    assert train(resume=folder).finished


def test_a_locked_folder_is_refused_and_an_unlocked_one_tidied(whole, tiny_dataset, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    left = [folder / f".{name}.0123abcd.tmp" for name in ("last.pt", "best.pt", "metrics.jsonl")]
    others = [folder / name for name in (".bench.json.0123abcd.tmp", ".last.pt.mine.tmp", "last.pt.0123abcd.tmp")]
    for path in (*left, *others):
        path.touch()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with run_lock(folder):
        for arguments in ({"resume": folder}, {"data": tiny_dataset, "config": CONFIG, "out": folder}):
            with pytest.raises(OutputError):
                train(**arguments)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(resume=folder).finished
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    assert journal(folder) == journal(whole.folder)


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def refused(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    with run_lock(tmp_path):
        pass
