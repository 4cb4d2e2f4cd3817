"""candidates.py over 1, 2 and 3 ranks: ``fetch`` returns the owners' values, ``store`` changes them."""

from typing import Any

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching import candidates as module
from titan_attent.systems.teaching.candidates import Candidates

N = 101
POOLS = [(0, 30), (17, 1), (71, 30), (0, 101), (50, 2)]  # start, size
FLOATS = np.random.default_rng(0).normal(size=N).astype(np.float32)
FLOATS[[3, 4, 5]] = np.nan, -0.0, np.inf
INTS = np.arange(N, dtype=np.int32) - 50


def move(mesh: Any) -> list[dict[str, np.ndarray]]:
    results = []
    owners = ExampleSharding(N, mesh=mesh)
    module._BLOCK = 7  # many blocks, with borders at all slots
    for start, size in POOLS:
        pool = Pool(N, order=(5, 0, 3), start=start, size=size)
        sharding = ExampleSharding(size, mesh=mesh)
        candidates = Candidates(pool, owners=owners, sharding=sharding, device=torch.device("cpu"))
        own = slice(owners.start, owners.stop)
        floats, ints = candidates.fetch([torch.from_numpy(FLOATS[own].copy()), torch.from_numpy(INTS[own].copy())])
        targets = [torch.from_numpy(FLOATS[own].copy()), torch.from_numpy(INTS[own].copy())]
        ids = candidates.ids_at(slice(0, sharding.num_local))
        candidates.store(targets, [ids.float() * 2, (ids + 1000).int()])
        results.append(
            {
                "ids": ids.numpy(),
                "floats": floats.numpy(),
                "ints": ints.numpy(),
                "stored": targets[0].numpy(),
                "stored ints": targets[1].numpy(),
            }
        )
    return results


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_values_go_to_the_places_and_back_bit_for_bit(num_ranks):
    ranks = run_on_ranks(move, num_ranks)
    for case, (start, size) in enumerate(POOLS):
        got = {name: np.concatenate([rank[case][name] for rank in ranks]) for name in ranks[0][case]}
        ids = Pool(N, order=(5, 0, 3), start=start, size=size).ids(torch.arange(size)).numpy()
        assert len(set(ids.tolist())) == size
        np.testing.assert_array_equal(got["ids"], ids)
        assert got["floats"].tobytes() == FLOATS[ids].tobytes()
        np.testing.assert_array_equal(got["ints"], INTS[ids])
        stored, stored_ints = FLOATS.copy(), INTS.copy()
        stored[ids], stored_ints[ids] = ids * 2, ids + 1000
        assert got["stored"].tobytes() == stored.tobytes()
        np.testing.assert_array_equal(got["stored ints"], stored_ints)
