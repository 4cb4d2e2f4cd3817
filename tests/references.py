"""Reference implementations that several test folders share: slow and simple versions of the package's functions."""

import itertools
from collections.abc import Iterable

import numpy as np
import torch

from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream


def exact_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The norm of all elements together, summed in fp64.

    torch's own norm sums squares in fp32: on a CPU it is 0.2% too low for 2^25 elements, and it depends on how a tensor
    is sharded. Tests that compare norms across numbers of ranks use this function.
    """
    return float(sum(tensor.detach().double().square().sum() for tensor in tensors)) ** 0.5


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def chi_square_critical(freedom: int, *, z: float = 3.72) -> float:
    """The value that chi-square exceeds with probability 1e-4 (z = 3.72): Wilson and Hilferty 1931."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + z * spread**0.5) ** 3


def plain_top_k(keys: np.ndarray, k: int) -> tuple[np.ndarray, int]:
    """bool mask of the k largest keys, ties by smallest id, and the (k+1)-th largest key or -1."""
    order = np.lexsort((np.arange(len(keys)), -keys))
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[order[:k]] = True
    return chosen, int(keys[order[k]]) if k < len(keys) else -1


def plain_top_k_by_hash(keys: np.ndarray, k: int, ids: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """The same mask, ties by the largest upper half of the hash of (seed, id), then by position."""
    hashes = hash_ids(torch.from_numpy(ids), derive_key(stream("ties"), *seed)).numpy() >> 32
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[np.lexsort((np.arange(len(keys)), -hashes, -keys))[:k]] = True
    return chosen


def sequential_sampling_law(probabilities: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """The probability of every k-subset when k are drawn one by one in proportion to the remaining probabilities."""
    law = dict.fromkeys(itertools.combinations(range(len(probabilities)), k), 0.0)
    for order in itertools.permutations(range(len(probabilities)), k):
        probability, remaining = 1.0, probabilities.sum()
        for i in order:
            probability *= probabilities[i] / remaining
            remaining -= probabilities[i]
        law[tuple(sorted(order))] += probability
    return law


def plain_inverse_weights(phi: np.ndarray, chosen: np.ndarray, kappa: float, max_weight: float) -> np.ndarray:
    """1 / q clipped, divided by its mean over the chosen, example by example; q = P(phi + Gumbel > kappa)."""
    weights = np.zeros(len(phi))
    for i in np.flatnonzero(chosen):
        q = 1.0 if phi[i] == np.inf or kappa == -np.inf else 1 - np.exp(-np.exp(phi[i] - kappa))
        weights[i] = min(1 / q if q > 0 else np.inf, max_weight)
    return weights / weights[chosen].mean()
