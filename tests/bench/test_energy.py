"""Meters are found in folders as the kernel lays them out, and add up what the device takes."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.bench import resources
from pmm_edge.bench.resources import RailMeter, RaplMeter, find_meter, measure_energy, power_rails, rapl_packages
from pmm_edge.runtime import Embedder
from pmm_edge.spec import InputSpec, ModelSpec


class Counted(Embedder):
    def __init__(self, device: str = "cpu") -> None:
        super().__init__(ModelSpec("pmm", "none", 1, InputSpec(4, 2), 3, {}), Path("model"), "none", device)
        self.runs = 0

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.runs += 1
        time.sleep(0.001)
        return np.zeros((len(images), 3), np.float32)


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def sensor(sys: Path, address: str, number: int, *channels: tuple[str, int, int], by_class: bool = True) -> Path:
    """An INA3221 as JetPack 5 and 6 show it: a device's folder that the driver and the class link to."""
    device = sys / "devices/platform/bus@0/c240000.i2c/i2c-1" / address
    hwmon = write(device / f"hwmon/hwmon{number}", name="ina3221", in7_label="sum of shunt voltages", in7_input=720)
    for channel, (label, volts, amperes) in enumerate(channels, start=1):
        write(hwmon, **{f"in{channel}_label": label, f"in{channel}_input": volts, f"curr{channel}_input": amperes})
    links = [(sys / "bus/i2c/drivers/ina3221" / address, device)]
    if by_class:
        links.append((sys / f"class/hwmon/hwmon{number}", hwmon))
    for link, target in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return hwmon


@pytest.mark.parametrize("by_class", [True, False])
def test_the_input_of_an_orin_nx_is_all_that_it_draws(tmp_path: Path, by_class: bool) -> None:
    channels = ("VDD_IN", 5000, 2000), ("VDD_CPU_GPU_CV", 5000, 800), ("VDD_SOC", 5000, 400)
    sensor(tmp_path, "1-0040", 4, *channels, by_class=by_class)
    write(tmp_path / "class/hwmon/hwmon0", name="tmp451", in1_label="VDD_IN", in1_input=1, curr1_input=1)
    (rail,) = power_rails(tmp_path)
    assert (rail.label, rail.watts) == ("VDD_IN", 10.0)


def test_the_rails_of_an_agx_orin_add_up(tmp_path: Path) -> None:
    sensor(tmp_path, "1-0040", 3, ("VDD_GPU_SOC", 20000, 500), ("VDD_CPU_CV", 20000, 100), ("VIN_SYS_5V0", 5000, 1000))
    second = sensor(tmp_path, "1-0041", 4, ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 300))
    (second / "in1_input").unlink()  # switched off
    rails = power_rails(tmp_path)
    assert {rail.label for rail in rails} == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}
    assert sum(rail.watts for rail in rails) == pytest.approx(17.0)


def test_rails_that_are_not_known_are_no_meter(tmp_path: Path) -> None:
    sensor(tmp_path, "1-0040", 3, ("VDD_SOMETHING", 5000, 1000))
    assert power_rails(tmp_path) == []
    assert find_meter("cpu", tmp_path) is None


def test_power_is_integrated_over_the_work(tmp_path: Path) -> None:
    hwmon = sensor(tmp_path, "1-0040", 3, ("VDD_IN", 5000, 1000))
    meter = RailMeter(power_rails(tmp_path))
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        start = time.perf_counter()
        time.sleep(0.2)
        seconds = time.perf_counter() - start

    assert meter.joules(work) == pytest.approx(5 * seconds, rel=0.5)
    (hwmon / "curr1_input").unlink()
    assert meter.joules(work) is None  # no figure rather than one of half the time
    assert threading.active_count() == 1 or all(thread.name != "power" for thread in threading.enumerate())


def package(sys: Path, domain: str, energy_uj: int, **files: object) -> Path:
    folder = sys / "class/powercap" / domain
    return write(folder, **{"name": "package-0", "energy_uj": energy_uj, "max_energy_range_uj": 999} | files)


def test_packages_of_a_processor(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 5), package(tmp_path, "intel-rapl:1", 5, name="package-1")
    package(tmp_path, "intel-rapl:0:0", 5, name="core")
    package(tmp_path, "intel-rapl:2", 5, name="psys")
    package(tmp_path, "intel-rapl-mmio:0", 5)  # the same package once more
    assert rapl_packages(tmp_path) == [first, second]
    (second / "energy_uj").unlink()  # only root may read it
    assert rapl_packages(tmp_path) == []


def test_counters_wrap(tmp_path: Path) -> None:
    first, second = package(tmp_path, "intel-rapl:0", 990), package(tmp_path, "intel-rapl:1", 100)

    def work() -> None:
        write(first, energy_uj=20)
        write(second, energy_uj=300)

    assert RaplMeter([first, second]).joules(work) == pytest.approx((29 + 200) / 1e6)


def test_energy_of_an_embedding(tmp_path: Path) -> None:
    domain = package(tmp_path, "intel-rapl:0", 0, max_energy_range_uj=10**12)

    class Drawing(Counted):
        def embed_prepared(self, images: np.ndarray) -> np.ndarray:
            embeddings = super().embed_prepared(images)
            write(domain, energy_uj=self.runs * 8_000_000)
            return embeddings

    found = measure_energy(Drawing(), np.zeros((4, 4, 2, 3), np.uint8), 0.05, tmp_path)
    assert found
    assert (found.source, found.batch) == ("RAPL", 4)
    assert found.joules_per_embedding == pytest.approx(2.0)  # the run before is not counted
    assert found.seconds >= 0.05
    assert found.watts > 100


def test_no_meter(tmp_path: Path) -> None:
    embedder = Counted()
    assert measure_energy(embedder, np.zeros((1, 4, 2, 3), np.uint8), sys=tmp_path) is None
    assert not embedder.runs


def test_the_processors_meter_says_nothing_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "intel-rapl:0", 0)
    monkeypatch.setattr(resources, "open_gpu", lambda device: None)
    assert find_meter("cuda:0", tmp_path) is None
    assert isinstance(find_meter("cpu", tmp_path), RaplMeter)


def test_a_gpus_own_meter_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensor(tmp_path, "1-0040", 3, ("VDD_IN", 5000, 1000))

    class Gpu:
        total: float | None = 100.0

        @property
        def joules(self) -> float | None:
            if self.total is not None:
                self.total += 50
            return self.total

    gpu = Gpu()
    monkeypatch.setattr(resources, "open_gpu", lambda device: gpu)
    found = measure_energy(Counted("cuda:0"), np.zeros((1, 4, 2, 3), np.uint8), 0.02, tmp_path)
    assert found
    assert (found.source, found.watts * found.seconds) == ("NVML", pytest.approx(50))
    gpu.total = None  # as on a Jetson, whose NVML has no such counter
    assert isinstance(find_meter("cuda:0", tmp_path), RailMeter)
