"""A machine that is not quiet is told so, with what to do about it."""

from pathlib import Path

from pmm_edge.bench.environment import MachineState, machine_state, machine_warnings
from pmm_edge.bench.report import Latency, Scope


def latency(variation: float, batch: int = 1, scope: Scope = "model", slowed_by: str = "") -> Latency:
    why = [slowed_by] if slowed_by else []
    return Latency(batch, scope, False, 50, 1.0, 1.0, 1.0, variation, 1.0, 1.0, 1.0, 1.0, slowed_by=why)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


QUIET = MachineState(load=0.1, cores=2, throttled=3)


def test_a_quiet_machine(tmp_path: Path) -> None:
    assert machine_warnings([latency(0.02), latency(0.14)], QUIET, root=tmp_path) == []
    assert machine_warnings([]) == []


def test_timings_that_vary(tmp_path: Path) -> None:
    (told,) = machine_warnings([latency(0.02), latency(0.2, 8), latency(0.31, 64, "end to end")], QUIET, root=tmp_path)
    assert told == (
        "2 of 3 timings are noisy, the worst (batch 64, end to end) varies by 31 % where a quiet machine stays below"
        " 15 %; end other work, of neighbours as well where it is a virtual machine, and measure again"
    )


def test_the_remedy_is_the_machines(tmp_path: Path) -> None:
    cpu = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    write(cpu / "scaling_governor", "powersave")
    assert "cpupower frequency-set -g performance" in machine_warnings([latency(0.5)], root=tmp_path)[0]
    write(tmp_path / "etc/nv_tegra_release", "# R36")
    assert "sudo nvpmodel -m 0 and sudo jetson_clocks" in machine_warnings([latency(0.5)], root=tmp_path)[0]
    write(cpu / "scaling_min_freq", 1984000)
    write(cpu / "scaling_max_freq", 1984000)
    assert "jetson_clocks" not in machine_warnings([latency(0.5)], root=tmp_path)[0]


def test_a_busy_machine(tmp_path: Path) -> None:
    (told,) = machine_warnings([latency(0.02)], MachineState(3.2, 2, None), root=tmp_path)
    assert told.startswith("the machine was busy before the measurement: a load of 3.2 on 2 cores; end other work")
    assert not machine_warnings([latency(0.02)], MachineState(3.2, 64, None), root=tmp_path)
    assert not machine_warnings([latency(0.02)], MachineState(None, 2, None), root=tmp_path)


def test_a_machine_that_slows_itself_down(tmp_path: Path) -> None:
    write(tmp_path / "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", 3)
    write(tmp_path / "sys/class/hwmon/hwmon2/oc1_event_cnt", 1)
    before = machine_state(tmp_path)
    assert before.throttled == 4
    before = MachineState(0.0, before.cores, before.throttled)
    assert machine_warnings([latency(0.02)], before, root=tmp_path) == []
    write(tmp_path / "sys/class/hwmon/hwmon2/oc1_event_cnt", 3)
    hot = [latency(0.02, slowed_by="its temperature"), latency(0.02), latency(0.02, 8, slowed_by="its power limit")]
    (told,) = machine_warnings([*hot, *hot], before, root=tmp_path)
    assert "(2 times by heat or current, the GPU by its temperature, the GPU by its power limit); cool it" in told


def test_the_load_is_what_others_want_now(tmp_path: Path) -> None:
    write(tmp_path / "proc/loadavg", "7.25 3.10 1.00 3/120 4711")  # a minute ago much ran; now two others do
    assert machine_state(tmp_path).load == 2
