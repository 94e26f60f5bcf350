"""A progress bar from TensorRT's own progress monitor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pmm_edge.progress import Report

_PERCENT = 100


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """The phases of a build under way, each outermost one reported in percent with the inner one as the detail.

    TensorRT nests phases: a step of one is done when the phases within it are.
    """

    def __init__(self, name: str, report: Report) -> None:
        self._name, self._report = name, report
        self._running: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._running[name] = _Phase(parent, steps)
        self._show(name)

    def step(self, name: str, number: int) -> None:
        self._running[name].done = number + 1
        self._show(name)

    def finish(self, name: str) -> None:
        """A phase may finish before all its steps are done."""
        if self._root_of(name) == name:
            self._report(f"{self._name}: {name}", _PERCENT, _PERCENT)
        del self._running[name]

    def _show(self, name: str) -> None:
        root = self._root_of(name)
        done = int(_PERCENT * self._fraction(root))
        self._report(f"{self._name}: {root}", done, _PERCENT, "" if root == name else name)

    def _root_of(self, name: str) -> str:
        parent = self._running[name].parent
        return self._root_of(parent) if parent in self._running else name

    def _fraction(self, name: str) -> float:
        """Of a phase, in 0..1, with the share of the step under way that its inner phases have done."""
        phase = self._running[name]
        inner = [self._fraction(other) for other, candidate in self._running.items() if candidate.parent == name]
        return min(1.0, (phase.done + max(inner, default=0.0)) / max(phase.steps, 1))


def progress_monitor(trt: Any, progress: BuildProgress) -> Any:
    """TensorRT's progress monitor that tells `progress`.

    An exception cannot pass through TensorRT: the one that comes up in a callback (Ctrl-C, most likely) cancels the
    build, and is raised by the monitor's `raise_caught`, to be called after it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._lock = threading.Lock()  # TensorRT calls from several threads
            self._caught: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(progress.start, phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(progress.step, phase_name, step)
            return self._caught is None

        def phase_finish(self, phase_name: str) -> None:
            self._tell(progress.finish, phase_name)

        def _tell(self, event: Callable[..., None], *arguments: object) -> None:
            try:
                with self._lock:
                    event(*arguments)
            except BaseException as error:
                self._caught = self._caught or error

        def raise_caught(self) -> None:
            if self._caught:
                raise self._caught

    return Monitor()
