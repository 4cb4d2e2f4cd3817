"""Selection over 1, 2 and 3 processes against gathering everything and sorting it."""

from functools import partial

import numpy as np
import pytest
import torch
from distributed.spawn import run_on_ranks
from references import plain_inverse_weights, plain_top_k, plain_top_k_by_hash

from titan_attent.data.plan.order import Pool, SelectedSlots
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.losses.records import NEVER, Records
from titan_attent.systems.teaching.audit import audit_scores, audit_selection
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.radix import KEY_OFFSET, largest_keys, ordered_keys, score_of_key
from titan_attent.systems.teaching.selection import (
    gather_bitmask,
    log_probabilities,
    lowest_log_probability,
    random_keys,
    select_top_k,
    soft_keys,
    unseen_first,
)
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.weights import inverse_probability_weights

KINDS = ("normal", "few values", "all equal", "mostly -inf", "extreme", "keys")
SIZES = (1, 2, 3, 8, 17, 1023, 10_000)
MANY_EQUAL = 70_000
"""More of one key than 16 bits count."""
SOFT_SIZES = (2, 7, 101, 5000)
CPU = torch.device("cpu")


def keys_of(kind: str, size: int) -> np.ndarray:
    """Keys of all N examples, as int64 in [0, 2^32)."""
    generator = np.random.default_rng(size)
    if kind == "keys":  # neighbours that differ in one byte
        return generator.integers(0, 2**32, size) & generator.choice([0xFF000000, 0xFFFF, 0xFF00FF00, 0xFFFFFFFF], size)
    scores = {
        "normal": lambda: generator.normal(3, 1, size),
        "few values": lambda: generator.integers(0, 3, size),
        "all equal": lambda: np.full(size, 2.5),
        "mostly -inf": lambda: np.where(generator.random(size) < 0.9, -np.inf, generator.normal(0, 1, size)),
        "extreme": lambda: generator.choice([3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, np.inf, -np.inf], size),
    }[kind]()
    return plain_keys(ordered_keys(torch.from_numpy(scores.astype(np.float32))))


def plain_keys(keys: torch.Tensor) -> np.ndarray:
    """int32 keys of tensors -> their values in [0, 2^32), int64."""
    return keys.numpy().astype(np.int64) + KEY_OFFSET


def counts_to_choose(size: int) -> list[int]:
    generator = np.random.default_rng(size)
    return sorted({1, size, *generator.integers(1, size + 1, 2).tolist()})


def cases() -> list[tuple[str, int, int]]:
    sizes = {"all equal": (*SIZES, MANY_EQUAL)}
    return [(kind, size, k) for kind in KINDS for size in sizes.get(kind, SIZES) for k in counts_to_choose(size)]


def given(ks: list[int], num_unseen: int, num_broken: int) -> list[int]:
    return ks


def select_everywhere(mesh) -> list[tuple]:
    results = []
    for kind, size, k in cases():
        sharding = ExampleSharding(size, mesh=mesh)
        keys = torch.from_numpy((keys_of(kind, size) - KEY_OFFSET).astype(np.int32))[sharding.start : sharding.stop]
        chosen, threshold = select_top_k(keys, k=k, sharding=sharding)
        bitmask = gather_bitmask(chosen, sharding=sharding)
        found = None
        if k % 4 == 1:  # several at once, some of them equal
            ranks = partial(given, [k, 1, size, k])
            found = largest_keys(keys.__getitem__, ranks, sharding=sharding, device=CPU)
        ids = partial(torch.add, sharding.start * 3, alpha=3)  # ids differ from slots
        by_hash, _ = select_top_k(keys, k=k, sharding=sharding, ids=ids, seed=(5, k))
        results.append((chosen.numpy(), threshold, found, bitmask, by_hash.numpy()))
    return results


def soft_scores(size: int) -> np.ndarray:
    generator = np.random.default_rng(size)
    scores = generator.gamma(2, 2, size).astype(np.float32)
    scores[generator.random(size) < 0.1] = np.inf
    scores[generator.random(size) < 0.1] = -np.inf
    return scores


def floor_log_probabilities(
    phi: torch.Tensor, everywhere: torch.Tensor, *, k: int, minimum: float, sharding: ExampleSharding
) -> torch.Tensor:
    """``phi`` of this rank raised to the floor, given those of all ranks."""
    finite = everywhere[torch.isfinite(everywhere)].double()
    lowest = lowest_log_probability(
        lambda block: phi[block],
        ends=(float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0),
        num_infinite=(int((everywhere == np.inf).sum()), int((everywhere == -np.inf).sum())),
        k=k,
        minimum=minimum,
        sharding=sharding,
        device=CPU,
    )
    return torch.where(phi == -np.inf, phi, phi.clamp(min=lowest))


def soft_everywhere(mesh) -> list[dict]:
    """Every step of a soft, hard and random draw: this rank's shard of each."""
    results = []
    for size in SOFT_SIZES:
        sharding = ExampleSharding(size, mesh=mesh)
        all_scores = torch.from_numpy(soft_scores(size))
        scores = all_scores[sharding.start : sharding.stop]
        k = max(1, size * 2 // 5)
        phi = log_probabilities(scores, temperature=0.7, normalization="softmax")
        floored = floor_log_probabilities(phi, all_scores.double() / 0.7, k=k, minimum=0.1, sharding=sharding)
        unseen, ids = scores == float("inf"), sharding.local_ids()
        keys = unseen_first(soft_keys(floored, ids=ids, seed=(1, 2, 3)), unseen, ids=ids, seed=(1, 2, 3))
        chosen, threshold = select_top_k(keys, k=k, sharding=sharding)
        weights = inverse_probability_weights(
            lambda block, phi=floored: phi[block],
            chosen=chosen,
            kappa=score_of_key(threshold),
            max_weight=3.0,
            sharding=sharding,
        )
        hard = unseen_first(ordered_keys(scores), unseen, ids=ids, seed=(1, 2, 3))
        random = random_keys(ids, seed=(1, 2, 3))
        last_draw = (ids % 5 - 1).int()  # -1: never
        steps = torch.where(torch.isfinite(scores), 60 - ids.int() % 50, NEVER)
        local = {
            "phi": floored,
            "keys": plain_keys(keys),
            "weights": weights,
            "hard": plain_keys(hard),
            "random": plain_keys(random),
            "chosen": chosen,
            "last_draw": last_draw,
            "steps": steps,
        }
        records = Records(sharding, scores, steps, scores, steps, steps)
        candidates = Candidates(Pool.whole(size), owners=sharding, sharding=sharding, device=CPU)
        choice = audit_selection(
            candidates,
            weights=weights,
            records=records,
            last_draw=last_draw,
            draw=4,
            step=60,
            sources=[("web", 0), ("code", size // 3), ("web", size // 2)],
        )
        statistics = audit_scores(Scores(scores, sharding=sharding)) | choice.scalars | {"num_new": choice.num_new}
        results.append(
            {name: np.asarray(x) for name, x in local.items()}
            | {"threshold": threshold, "audit": statistics, "digest": choice.digest}
        )
    return results


def everything(mesh) -> tuple[list, list]:
    return select_everywhere(mesh), soft_everywhere(mesh)


@pytest.fixture(scope="module")
def worlds() -> dict[int, list]:
    return {num_ranks: run_on_ranks(everything, num_ranks) for num_ranks in (1, 2, 3)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_top_k_and_its_bitmask_are_those_of_a_sort(worlds, num_ranks):
    ranks = [selected for selected, _ in worlds[num_ranks]]
    for case, (kind, size, k) in enumerate(cases()):
        where = f"{kind}, N = {size}, k = {k}"
        keys = keys_of(kind, size)
        expected, expected_threshold = plain_top_k(keys, k)
        at_ends = [int(np.sort(keys)[-place]) for place in (k, 1, size, k)]
        np.testing.assert_array_equal(np.concatenate([rank[case][0] for rank in ranks]), expected, err_msg=where)
        for rank in ranks:
            _, threshold, found, bitmask, _ = rank[case]
            assert threshold == expected_threshold, where
            expected_found = [(key, int((keys > key).sum()), int((keys == key).sum())) for key in at_ends]
            assert found in (None, expected_found), where
            np.testing.assert_array_equal(bitmask, np.packbits(expected, bitorder="little"), err_msg=where)
        selected = SelectedSlots(size, bitmask=ranks[0][case][3])
        assert len(selected) == k
        np.testing.assert_array_equal(selected.select(np.arange(k)), np.flatnonzero(expected), err_msg=where)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ties_go_by_hash_on_any_number_of_ranks(worlds, num_ranks):
    for case, (kind, size, k) in enumerate(cases()):
        chosen = np.concatenate([selected[case][4] for selected, _ in worlds[num_ranks]])
        expected = plain_top_k_by_hash(keys_of(kind, size), k, 3 * np.arange(size), (5, k))
        np.testing.assert_array_equal(chosen, expected, err_msg=f"{kind}, N = {size}, k = {k}")


LOCAL = ("phi", "keys", "weights", "hard", "random", "chosen", "last_draw", "steps")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_keys_floor_and_weights_are_bit_for_bit_those_of_one_process(worlds, num_ranks):
    (_, expected_cases), ranks = worlds[1][0], [soft for _, soft in worlds[num_ranks]]
    for case, expected in enumerate(expected_cases):
        for name in LOCAL:
            whole = np.concatenate([rank[case][name] for rank in ranks])
            assert whole.tobytes() == expected[name].tobytes(), (name, SOFT_SIZES[case])
        for rank in ranks:
            assert rank[case]["threshold"] == expected["threshold"]
            assert rank[case]["audit"] == expected["audit"]
            assert rank[case]["digest"] == expected["digest"]


def test_a_soft_draw_is_that_of_plain_arrays(worlds):
    for size, result in zip(SOFT_SIZES, worlds[1][0][1], strict=True):
        k = max(1, size * 2 // 5)
        chosen, threshold = plain_top_k(result["keys"], k)
        np.testing.assert_array_equal(result["chosen"], chosen)
        assert result["threshold"] == threshold
        kappa = score_of_key(threshold)
        np.testing.assert_allclose(
            result["weights"], plain_inverse_weights(result["phi"], chosen, kappa, 3.0), rtol=2e-6, err_msg=str(size)
        )
        scores = soft_scores(size)
        unseen = np.isposinf(scores)
        for keys in (result["keys"], result["hard"]):
            assert not unseen.any() or keys[unseen].min() > keys[~unseen].max(initial=-1)
        order = np.argsort(-result["hard"][~unseen], kind="stable")
        np.testing.assert_array_equal(order, np.argsort(-scores[~unseen], kind="stable"))
        assert len(set(result["random"].tolist())) == size


def test_audit_of_several_ranks_is_that_of_numpy(worlds):
    for num_ranks in (1, 2, 3):
        for case, size in enumerate(SOFT_SIZES):
            parts = [soft[case] for _, soft in worlds[num_ranks]]
            names = ("steps", "chosen", "last_draw", "weights")
            steps, chosen, last, weights = (np.concatenate([part[name] for part in parts]) for name in names)
            code = (np.arange(size) >= size // 3) & (np.arange(size) < size // 2)
            finite = soft_scores(size)[np.isfinite(soft_scores(size))].astype(np.float64)
            assert parts[-1]["audit"] == pytest.approx(
                {
                    "teacher/importance_mean": finite.mean(),
                    "teacher/importance_p99": np.sort(finite)[-max(1, len(finite) // 100)],
                    "teacher/effective_sample_size": finite.sum() ** 2 / (len(finite) * (finite**2).sum()),
                    "teacher/loss_age": (60 - steps[steps >= 0]).mean(),
                    "teacher/overlap": (chosen & (last == 3)).sum() / chosen.sum(),
                    "teacher/max_weight": weights.max(),
                    "teacher/inclusion/web": chosen[~code].mean(),
                    "num_new": (chosen & (last < 0)).sum(),
                }
                | ({"teacher/inclusion/code": chosen[code].mean()} if code.any() else {}),
                rel=1e-3,  # sums of scores are taken in 2^-15 of the largest
            )
