"""The benchmark of the data pipeline runs on a small set and shows each part by itself; no figure is judged here."""

import sys
from pathlib import Path


def test_it_shows_each_part_and_what_two_steps_wait(monkeypatch, capsys, tiny_dataset, tiny_checkpoint):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import data_pipeline

    small = ["--height", "96", "--width", "64", "--rounds", "1", "--batch", "8", "--steps", "3", "--step", "0.001"]
    monkeypatch.setattr(sys, "argv", ["data_pipeline.py", str(tiny_dataset), *small])
    data_pipeline.main()
    printed = capsys.readouterr().out
    for part in (
        "decoded, each",
        "assembled in host",
        "augmented on cpu",
        "both together",
        "plain PIL",
        "of pmm train",
    ):
        assert part in printed
