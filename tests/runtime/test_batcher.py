"""Crops of many threads share batches, and each gets its own embedding or its own error."""

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pmm_edge.errors import DataError, PmmError
from pmm_edge.runtime import Embedder
from pmm_edge.runtime.batcher import Batcher
from pmm_edge.runtime.manifest import BatchProfile
from pmm_edge.spec import InputSpec, ModelSpec


class MeanColour(Embedder):
    """A crop's mean colour. While the gate is closed, a batch stays in the network."""

    def __init__(self) -> None:
        spec = ModelSpec("baseline", "none", 4, InputSpec(8, 4), 3, {"I": (0, 3)})
        super().__init__(spec, Path("colour"), "none", "cpu")
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fails: Exception | None = None

    def embed_prepared(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(len(images))
        self.gate.wait(10)
        if self.fails:
            raise self.fails
        return images.mean(axis=(1, 2), dtype=np.float32)


@pytest.fixture
def embedder() -> MeanColour:
    return MeanColour()


def crop(value: int) -> np.ndarray:
    return np.full((8, 4, 3), value, np.uint8)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came")


def waiting(batcher: Batcher, number: int) -> None:
    until(lambda: batcher._waiting.qsize() == number)


def test_each_thread_gets_its_own_embedding(embedder: MeanColour) -> None:
    with Batcher(embedder) as batcher, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda value: batcher.embed(crop(value)), range(200)))
    np.testing.assert_array_equal(np.stack(found), np.repeat(np.arange(200)[:, None], 3, axis=1))
    assert sum(embedder.batches) == 200
    assert batcher.sizes.total() == len(embedder.batches)


def test_what_waits_is_the_next_batch(embedder: MeanColour) -> None:
    embedder.gate.clear()
    with Batcher(embedder, largest_batch=4) as batcher, ThreadPoolExecutor(6) as pool:
        first = pool.submit(batcher.embed, crop(0))
        until(lambda: embedder.batches == [1])  # a crop that comes alone does not wait for others
        others = [pool.submit(batcher.embed, crop(value)) for value in range(1, 6)]
        waiting(batcher, 5)
        embedder.gate.set()
        assert [done.result(10)[0] for done in (first, *others)] == [0, 1, 2, 3, 4, 5]
    assert embedder.batches == [1, 4, 1]
    assert batcher.sizes == {1: 2, 4: 1}


def test_a_batch_is_as_large_as_the_engine_takes(embedder: MeanColour) -> None:
    assert Batcher(embedder).largest_batch == 64
    embedder.profile = BatchProfile(1, 2, 3)
    embedder.gate.clear()
    with Batcher(embedder) as batcher, ThreadPoolExecutor(5) as pool:
        first = pool.submit(batcher.embed, crop(0))
        until(lambda: embedder.batches == [1])
        others = [pool.submit(batcher.embed, crop(value)) for value in range(1, 5)]
        waiting(batcher, 4)
        embedder.gate.set()
        assert [done.result(10)[0] for done in (first, *others)] == [0, 1, 2, 3, 4]
    assert embedder.batches == [1, 3, 1]


def test_a_delay_gathers_what_comes_soon(embedder: MeanColour) -> None:
    with Batcher(embedder, largest_batch=3, delay=10.0) as batcher, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda value: batcher.embed(crop(value)), range(3)))
    assert embedder.batches == [3]  # full before the delay was over


def test_a_bad_crop_is_its_own_threads_error(embedder: MeanColour) -> None:
    embedder.gate.clear()
    with Batcher(embedder) as batcher, ThreadPoolExecutor(3) as pool:
        good = pool.submit(batcher.embed, crop(3))
        bad = pool.submit(batcher.embed, crop(3).astype(np.float32))
        with pytest.raises(DataError, match="holds float32"):
            bad.result(10)
        embedder.gate.set()
        assert good.result(10)[0] == 3


def test_crops_of_any_size(embedder: MeanColour) -> None:
    with Batcher(embedder) as batcher:
        assert batcher.embed(np.full((31, 17, 3), 9, np.uint8)).tolist() == [9, 9, 9]


def test_a_batch_that_fails_does_not_end_the_batcher(embedder: MeanColour) -> None:
    with Batcher(embedder) as batcher:
        embedder.fails = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            batcher.embed(crop(1))
        embedder.fails = None
        assert batcher.embed(crop(1))[0] == 1


def test_closing_embeds_what_waits_and_takes_nothing_new(embedder: MeanColour) -> None:
    embedder.gate.clear()
    batcher = Batcher(embedder, largest_batch=2)
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(batcher.embed, crop(0))]
        until(lambda: embedder.batches == [1])
        running += [pool.submit(batcher.embed, crop(value)) for value in range(1, 4)]
        waiting(batcher, 3)
        closing = pool.submit(batcher.close)
        until(lambda: batcher._closed)
        with pytest.raises(PmmError, match="the batcher is closed"):
            batcher.embed(crop(1))
        embedder.gate.set()
        closing.result(10)
        assert sorted(done.result(10)[0] for done in running) == [0, 1, 2, 3]
    batcher.close()
    assert not batcher._thread.is_alive()


def test_a_batcher_that_nobody_holds_ends_its_thread(embedder: MeanColour) -> None:
    batcher = Batcher(embedder)
    thread = batcher._thread
    del batcher
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(("largest", "delay"), [(0, 0.0), (1, -1.0)])
def test_settings_that_make_no_batch(embedder: MeanColour, largest: int, delay: float) -> None:
    with pytest.raises(PmmError, match="cannot be made"):
        Batcher(embedder, largest, delay)
