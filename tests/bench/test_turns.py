"""Work takes turns, is warm before it is timed, and runs often and long enough. Only the work moves the clock."""

from itertools import groupby

import pytest

from pmm_edge.bench.resources import Reading
from pmm_edge.bench.timing import Times, Work, time_in_turns, warm_up


class Machine:
    """A clock, and work that moves it; it notes who ran when."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def clock(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Work:
        """Takes `seconds` run by run, from then on the last of them."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Work(run)


def timed(machine: Machine, *works: Work, min_runs: int = 50, min_seconds: float = 2.0) -> list[Times]:
    return time_in_turns(works, min_runs, min_seconds, clock=machine.clock)


def test_enough_runs_of_slow_work() -> None:
    machine = Machine()
    (times,) = timed(machine, machine.work("a", 0.5))
    assert [len(turn) for turn in times.turns] == [5] * 10
    assert times.seconds == pytest.approx([0.5] * 50)


def test_enough_seconds_of_fast_work() -> None:
    machine = Machine()
    (times,) = timed(machine, machine.work("a", 0.001))
    assert len(times.turns) == 20
    assert 2.0 <= sum(times.seconds) < 2.2


def test_work_of_any_speed_takes_the_same_turns() -> None:
    machine = Machine()
    slow, fast = timed(machine, machine.work("slow", 0.5), machine.work("fast", 1 / 64))
    assert [len(turn) for turn in slow.turns] == [5] * 10
    assert [len(turn) for turn in fast.turns] == [14] * 10  # 2 s, and a margin
    order = [(name, len(list(run))) for name, run in groupby(machine.calls)]
    assert order[2:] == [("slow", 6), ("fast", 15)] * 10  # behind the warm-up; the first of each is not counted


def test_the_first_run_of_a_turn_is_not_counted() -> None:
    machine = Machine()
    cold_after = {"a": "b", "b": "a"}

    def work(name: str) -> Work:
        def run() -> None:
            cold = machine.calls[-1:] == [cold_after[name]]
            machine.calls.append(name)
            machine.now += 5.0 if cold else 0.1

        return Work(run)

    for times in timed(machine, work("a"), work("b"), min_seconds=0):
        assert times.seconds == pytest.approx([0.1] * 50)


def test_warming_up_ends_when_it_is_stable() -> None:
    machine = Machine()
    usual = warm_up(machine.work("a", 1.0, 0.5, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1).run, machine.clock)
    assert usual == pytest.approx(0.1)
    assert len(machine.calls) >= 8


def test_slow_first_runs_are_not_counted() -> None:
    machine = Machine()
    (times,) = timed(machine, machine.work("a", 0.9, 0.6, 0.4, 0.3, 0.2, 0.02))
    assert times.seconds == pytest.approx([0.02] * len(times.seconds))


def test_warming_up_ends_though_it_is_never_stable() -> None:
    machine = Machine()
    durations = [0.1 * 1.2**number for number in range(40)]
    warm_up(machine.work("a", *durations).run, machine.clock)
    assert machine.now < 10


def test_work_of_seconds_is_warmed_up_with_two_runs() -> None:
    machine = Machine()
    warm_up(machine.work("a", 2.0).run, machine.clock)
    assert len(machine.calls) == 2


def test_work_that_becomes_faster_is_run_on() -> None:
    machine = Machine()
    first, second = timed(machine, machine.work("a", *[0.05] * 30, 0.01), machine.work("b", 0.05))
    assert sum(first.seconds) >= 2.0
    assert first.turns[-1]
    assert not second.turns[-1]  # it had enough
    assert len(first.turns) == len(second.turns)


def test_progress_says_how_long_it_may_take() -> None:
    machine, told = Machine(), []
    time_in_turns([machine.work("a", 1.0)], 50, 2.0, lambda *said: told.append(said), "timing batch 64", machine.clock)
    assert told[0] == ("timing batch 64", 0, 100, "warming up")
    assert told[1] == ("timing batch 64", 10, 100, "54 s left")  # 9 turns of 6 runs
    assert told[-1] == ("timing batch 64", 100, 100)
    assert [said[1] for said in told] == sorted(said[1] for said in told)


def test_gpu_time_is_asked_once_a_turn() -> None:
    machine = Machine()
    work = machine.work("a", 0.5)
    (times,) = timed(machine, Work(work.run, lambda: 3.0))
    assert times.gpu_ms == [3.0] * 10


def test_clocks_are_read_at_the_end_of_each_turn_while_the_device_is_hot() -> None:
    machine = Machine()
    work = machine.work("a", 0.5)

    def reading() -> Reading:
        machine.now += 100  # is not timed
        machine.calls.append("clocks")
        return Reading(gpu_mhz=len(machine.calls))

    def on_gpu() -> float:
        machine.calls.append("events")
        return 3.0

    (times,) = timed(machine, Work(work.run, on_gpu, reading))
    assert times.seconds == pytest.approx([0.5] * 50)
    turns = machine.calls[-8 * len(times.turns) :]
    assert turns == [*["a"] * 6, "clocks", "events"] * 10
    assert len(times.readings) == 10
    assert len({reading.gpu_mhz for reading in times.readings}) == 10
