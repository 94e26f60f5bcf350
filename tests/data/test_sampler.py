import numpy as np

from pmm_edge.data.loader import identity_batches


def test_an_epoch_draws_every_identity_once_with_its_own_images():
    pids = np.repeat(np.arange(10), [4, 9, 2, 6, 4, 4, 7, 1, 5, 8])
    batches = identity_batches(pids, identities=4, images=4, generator=np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [16, 16, 8]
    groups = np.concatenate(batches).reshape(-1, 4)
    assert sorted(pids[groups[:, 0]]) == list(range(10))
    assert (pids[groups] == pids[groups[:, :1]]).all()
    for group in groups:
        assert len(np.unique(group)) == min(4, (pids == pids[group[0]]).sum())


def test_a_last_batch_of_one_identity_is_dropped():
    batches = identity_batches(np.repeat(np.arange(5), 4), 4, 4, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [16]


def test_the_generator_decides_the_epoch():
    pids = np.repeat(np.arange(8), 6)
    one, same, other = (np.concatenate(identity_batches(pids, 4, 4, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
