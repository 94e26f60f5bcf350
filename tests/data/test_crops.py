import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from pmm_edge.data.checks import unreadable
from pmm_edge.data.loader import Crops
from pmm_edge.errors import DataError
from pmm_edge.images import read_crop


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.jpg" for number in range(7)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("kept", [0, 3, 7])
def test_batches_are_the_decoded_images_whatever_fits_in_memory(paths, kept):
    crops = Crops(paths, 24, 12, cache_bytes=kept * 24 * 12 * 3)
    expected = np.stack([read_crop(path, 24, 12) for path in paths])
    batches = [np.array([5, 0]), np.array([6, 6, 1]), np.array([2, 3, 4])]
    for _ in range(2):
        for indices, batch in zip(batches, crops.prefetched(batches), strict=True):
            np.testing.assert_array_equal(batch, expected[indices])


def test_kept_images_are_decoded_once(paths):
    crops = Crops(paths, 24, 12)
    first = crops.batch(np.arange(7))
    for path in paths:
        path.unlink()
    np.testing.assert_array_equal(crops.batch(np.arange(7)), first)


def test_a_truncated_image_is_named(paths):
    paths[3].write_bytes(paths[3].read_bytes()[:300])
    with pytest.raises(DataError, match=r"cannot read image .*3\.jpg"):
        Crops(paths, 24, 12).batch(np.arange(7))


SHORT = """
import resource
from pathlib import Path
from pmm_edge.data.loader import Crops

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20), used + (600 << 20)))
crops = Crops([Path("unread.jpg")] * 1024, 1024, 1024)
print(crops.short_of_memory, crops.kept_bytes >> 20, crops.all_bytes >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has from /proc")
def test_where_memory_is_short_half_of_what_there_is_is_taken():
    done = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["True", "192", "3072"], done.stderr  # of 3072 MiB, 1536 and 768 are not there


def test_one_thread_decodes_on_each_core_that_may_be_used(paths, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert Crops(paths, 24, 12).workers == 1
    seen = set()

    def recorded(*_):
        seen.add(threading.get_ident())
        time.sleep(0.001)

    monkeypatch.setattr("pmm_edge.data.checks.read_crop", recorded)
    assert not unreadable(paths * 10)
    assert len(seen) == 1
