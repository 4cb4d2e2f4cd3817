"""Strategies: scores of all examples -> which are chosen, and with what weights. One function each.

    random      keys that know nothing of the losses
    hard        the k largest scores
    soft        Gumbel-top-k: k draws without replacement in proportion to exp(score / T), with a floor for each
    threshold   InfoBatch (Qin et al., ICLR 2024): below the mean score each example is left out with probability 1/2

All are collectives over integer sums, equal for every number of ranks; see selection.py for the cost.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from titan_attent.job_config import TeacherConfig
from titan_attent.teacher.candidates import Candidates
from titan_attent.teacher.importance import clip_outliers, fixed_point_sums
from titan_attent.teacher.selection import (
    UNSEEN_KEY,
    floor_log_probabilities,
    log_probabilities,
    random_keys,
    score_of_key,
    select_top_k,
    soft_keys,
    with_unseen_first,
)
from titan_attent.teacher.weights import inverse_probability_weights, mean_one

Seed = tuple[int, ...]
Strategy = Callable[[Tensor, int, TeacherConfig, Seed, Candidates], tuple[Tensor, Tensor]]
"""(scores fp32 [num_local], k, config, seed, candidates) -> (chosen bool [num_local], weights fp32 [num_local]).

The weights are 0 where not chosen and average 1 over the chosen examples of all ranks.
"""

THRESHOLD_DROP = 0.5
"""InfoBatch's pruning probability r; the published default."""


def random(scores: Tensor, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """A random subset of size k."""
    chosen, _ = select_top_k(random_keys(candidates.ids, seed=seed), k=k, sharding=candidates.sharding)
    return chosen, chosen.float()


def hard(scores: Tensor, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """The k largest scores, the never-seen first."""
    keys = with_unseen_first(scores, scores == float("inf"), ids=candidates.ids, seed=seed)
    chosen, _ = select_top_k(keys, k=k, sharding=candidates.sharding)
    return chosen, chosen.float()


def soft(scores: Tensor, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """A draw without replacement; weighted by the inverse inclusion probability if the config says so."""
    sharding = candidates.sharding
    scores = clip_outliers(scores, sharding=sharding)
    phi = log_probabilities(scores, temperature=config.temperature, normalization=config.normalization)
    phi = floor_log_probabilities(phi, k=k, minimum=config.min_inclusion_probability, sharding=sharding)
    chosen, threshold = select_top_k(soft_keys(phi, ids=candidates.ids, seed=seed), k=k, sharding=sharding)
    # With a threshold among the unseen, all that was drawn is equal.
    if config.weighting != "inverse_probability" or threshold >= UNSEEN_KEY:
        return chosen, chosen.float()
    kappa = score_of_key(threshold) if threshold >= 0 else float("-inf")
    weights = inverse_probability_weights(
        phi, chosen=chosen, kappa=kappa, max_weight=config.max_weight, sharding=sharding
    )
    return chosen, weights


def threshold(
    scores: Tensor, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates
) -> tuple[Tensor, Tensor]:
    """Half of the scores below the mean are left out; the other half counts double. ``k`` is not read.

    InfoBatch sums the weighted losses; here the weights are divided by their mean (law 6 of the design), so that the
    learning rate keeps its meaning: the ratio of 2 to 1 is the published one. Examples never scored are kept.
    """
    sharding, finite = candidates.sharding, torch.isfinite(scores)
    total, _, count = fixed_point_sums(torch.where(finite, scores, 0.0), finite, sharding=sharding)
    below = torch.where(finite, scores.double() < total / max(1, count), scores < 0)  # -inf, never finite: below
    coin = random_keys(candidates.ids, seed=seed)
    chosen = ~below | (coin >= THRESHOLD_DROP * 2**32)
    weights = torch.where(below, 1.0 / (1.0 - THRESHOLD_DROP), 1.0) * chosen
    return chosen, mean_one(weights.double(), chosen=chosen, sharding=sharding)


STRATEGIES: dict[str, Strategy] = {"random": random, "hard": hard, "soft": soft, "threshold": threshold}


def choose(
    scores: Tensor,
    *,
    k: int,
    config: TeacherConfig,
    seed: Seed,
    candidates: Candidates,
    excluded: Tensor | None = None,
    at_least: int,
) -> tuple[Tensor, int]:
    """Apply ``config.strategy``; a collective.

    Args:
        scores: fp32 [num_local], importances of the candidates.
        excluded: bool [num_local], candidates that no strategy may take.
        at_least: everything is chosen, with equal weights, where fewer would be: "threshold" may leave less than a
            batch, a pass without a step.

    Returns:
        (weights, number chosen): fp32 [num_local], 0 where not chosen and above 0 elsewhere, mean 1 over the chosen
        of all ranks; the number of these.
    """
    if excluded is not None:
        scores = torch.where(excluded, float("-inf"), scores)
    chosen, weights = STRATEGIES[config.strategy](scores, k, config, seed, candidates)
    if excluded is not None:
        chosen = chosen & ~excluded
        weights = mean_one(weights.double() * chosen, chosen=chosen, sharding=candidates.sharding)
    num_chosen = int(candidates.sharding.sum(chosen.sum()))
    if num_chosen < at_least:
        return torch.ones_like(weights), candidates.pool.size
    return weights, num_chosen


REDRAWN = ("soft", "threshold")
"""Strategies that draw anew for each pass of a round."""


def is_weighted(config: TeacherConfig) -> bool:
    """Whether selected examples may have other weights than 1 before their loss is known."""
    return config.strategy == "threshold" or (config.strategy == "soft" and config.weighting == "inverse_probability")
