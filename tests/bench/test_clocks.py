"""Clocks are those of the cores and the GPU that were at work."""

import os
from pathlib import Path

import pytest

from pmm_edge.bench import resources
from pmm_edge.bench.report import Clocks
from pmm_edge.bench.resources import Reading, clock_range, clock_reader, jetson_gpu


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def core(root: Path, number: int, khz: object) -> None:
    write(root / f"sys/devices/system/cpu/cpu{number}/cpufreq/scaling_cur_freq", khz)


def test_the_fastest_core_that_may_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 10}, raising=False)
    for number, khz in ((0, 800_000), (1, "<unknown>"), (2, 5_000_000), (10, 3_400_000)):
        core(tmp_path, number, khz)
    read = clock_reader("cpu", tmp_path)
    assert read() == Reading(3400)
    core(tmp_path, 10, 3_100_000)
    assert read() == Reading(3100)


def test_many_slow_cores_do_not_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []

    def slow(path: Path) -> str:
        asked.append(path)
        now[0] += 0.0004
        return "1200000"

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(resources.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(resources, "text_of", slow)
    for number in range(64):
        core(tmp_path, number, 0)
    assert clock_reader("cpu", tmp_path)() == Reading(1200)
    assert len(asked) == 3


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    assert clock_reader("cpu", tmp_path)() == Reading()
    assert jetson_gpu(tmp_path) is None


def test_a_jetsons_gpu_where_it_is_at_work(tmp_path: Path) -> None:
    write(tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq", 918_000_000)
    write(tmp_path / "sys/class/devfreq/15340000.vic/cur_freq", 115_200_000)
    assert clock_reader("cuda:0", tmp_path)() == Reading(gpu_mhz=918)
    assert clock_reader("cpu", tmp_path)() == Reading()


def test_a_gpu_with_what_slows_it_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        clock_mhz, slowed_by = 1410, ["its power limit"]

    monkeypatch.setattr(resources, "open_gpu", lambda device: Gpu() if device == "cuda:1" else None)
    assert clock_reader("cuda:1", tmp_path)() == Reading(None, 1410, ("its power limit",))


def test_a_range_is_of_what_was_told() -> None:
    assert clock_range([1500, None, 1200, 1400]) == Clocks(1200, 1500)
    assert clock_range([None, None]) is None
