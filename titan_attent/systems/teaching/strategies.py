"""Strategies: scores of all candidates -> the selected examples and their weights. One function each.

To add a strategy, write one function here with the decorator and a docstring. Its first paragraph goes into
docs/reference/reference.md, and its name becomes a value of ``[teacher] strategy``. Its test, against a plain teacher
in numpy, belongs in tests/distributed/systems/teaching/test_teacher.py.

All strategies are collectives over integer sums, equal for every number of ranks; see selection.py for the cost.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.radix import (
    KEY_OFFSET,
    UNSEEN_KEY,
    BlockValues,
    blocks,
    ordered_keys,
    score_of_key,
)
from titan_attent.systems.teaching.selection import (
    log_probabilities,
    lowest_log_probability,
    random_keys,
    select_top_k,
    soft_keys,
    unseen_first,
)
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.weights import inverse_probability_weights, mean_one

Seed = tuple[int, ...]
Strategy = Callable[[Scores, int, TeacherConfig, Seed, Candidates], tuple[Tensor, int]]
"""(scores, k, config, seed, candidates) -> (weights fp32 [num_local], number selected over all ranks).

The weights are 0 where not selected, above 0 elsewhere, and average 1 over the selected examples of all ranks. Where
candidates have tokens, k and the number selected are of tokens, the latter at least, and the average is over tokens.
"""

STRATEGIES: dict[str, Strategy] = {}
"""The strategies, by their name in ``[teacher] strategy``."""

REDRAWN: set[str] = set()
"""Names of the strategies that draw anew for each pass of a round."""

READ_THE_RATIO: set[str] = set()
"""Names of the strategies that select as many examples as the schedule says."""

_WEIGHTED_WHERE: dict[str, tuple[str, ...]] = {}


def _strategy(
    *, redrawn: bool = False, reads_ratio: bool = True, weighted_where: tuple[str, ...] = ()
) -> Callable[[Strategy], Strategy]:
    """Register a function as the strategy of its name.

    Args:
        redrawn: it draws anew for each pass of a round.
        reads_ratio: it selects as many examples as the schedule says.
        weighted_where: values of ``[teacher] weighting`` with which its weights may differ from 1.
    """

    def add(function: Strategy) -> Strategy:
        name = function.__name__
        STRATEGIES[name], _WEIGHTED_WHERE[name] = function, weighted_where
        if redrawn:
            REDRAWN.add(name)
        if reads_ratio:
            READ_THE_RATIO.add(name)
        return function

    return add


def is_weighted(config: TeacherConfig) -> bool:
    """Whether selected examples may have weights other than 1 before their loss is computed."""
    return config.weighting in _WEIGHTED_WHERE.get(config.strategy, ())


THRESHOLD_DROP = 0.5
"""InfoBatch's pruning probability r; the published default."""


@_strategy()
def random(scores: Scores, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, int]:
    """A random subset of the size that the schedule says: the control at equal compute. Equal weights."""
    keys = _keys(lambda block: random_keys(candidates.ids_at(block), seed=seed), candidates)
    return _top(keys, k, seed, candidates)[0].float(), k


@_strategy()
def hard(scores: Scores, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, int]:
    """The examples of largest importance, never-trained ones first, exact over all ranks. Equal weights. Among equal
    importances a keyed hash decides.

    Weights cannot correct for examples that are dropped with certainty.
    """
    keys = _keys_of_seen(lambda block: ordered_keys(scores.values[block]), scores, seed, candidates)
    return _top(keys, k, seed, candidates)[0].float(), k


@_strategy(redrawn=True, weighted_where=("inverse_probability",))
def soft(scores: Scores, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, int]:
    """A draw without replacement in proportion to exp(importance / temperature), with a minimum probability for every
    example.

    Gumbel-top-k, drawn anew for each pass. Weights of 1 / inclusion probability, clipped, mean 1, if ``weighting`` says
    so.
    """
    sharding, summary, device = candidates.sharding, scores.summary, candidates.device

    def unfloored(clipped: Tensor) -> Tensor:
        return log_probabilities(clipped, temperature=config.temperature, normalization=config.normalization)

    low, high = unfloored(torch.tensor([summary.low, summary.high], device=device)).tolist()
    infinite = (summary.num_unseen, summary.num_broken)
    if candidates.tokens is not None:
        infinite = (scores.metrics.unseen, scores.metrics.broken)
    lowest = lowest_log_probability(
        lambda block: unfloored(summary.clipped(scores.values[block])),
        ends=(low, high),
        num_infinite=infinite,
        k=k,
        minimum=config.min_inclusion_probability,
        sharding=sharding,
        device=device,
        tokens=candidates.tokens,
    )

    def phi(block: slice) -> Tensor:
        raw = unfloored(summary.clipped(scores.values[block]))
        if not summary.num_broken:
            return raw.clamp_(min=lowest)
        return torch.where(raw == float("-inf"), raw, raw.clamp(min=lowest))

    keys = _keys_of_seen(
        lambda block: soft_keys(phi(block), ids=candidates.ids_at(block), seed=seed), scores, seed, candidates
    )
    chosen, threshold = _top(keys, k, seed, candidates)
    del keys
    # If the threshold is the key of an unseen example, only unseen examples were drawn: equal weights.
    if config.weighting != "inverse_probability" or threshold >= UNSEEN_KEY:
        return chosen.float(), k
    kappa = score_of_key(threshold) if threshold >= 0 else float("-inf")
    return inverse_probability_weights(
        phi,
        chosen=chosen,
        kappa=kappa,
        max_weight=config.max_weight,
        sharding=sharding,
        tokens=candidates.tokens,
    ), k


@_strategy(redrawn=True, reads_ratio=False, weighted_where=("none", "inverse_probability"))
def threshold(scores: Scores, k: int, config: TeacherConfig, seed: Seed, candidates: Candidates) -> tuple[Tensor, int]:
    """A random half of the examples below the mean importance is left out, drawn anew for each pass; the other half
    counts double.

    InfoBatch (Qin et al., ICLR 2024). It does not read ``k``, hence not the ratio. InfoBatch sums the weighted losses;
    here the weights are divided by their mean (law 6 of the design), so that the learning rate keeps its meaning. The
    ratio of 2 to 1 is the published one. Examples never scored are kept.
    """
    mean, weights = scores.metrics.mean, torch.empty_like(scores.values)
    for block in blocks(len(weights), device=weights.device):
        below = scores.values[block].double() < mean  # includes -inf, a loss that was never finite
        is_kept = random_keys(candidates.ids_at(block), seed=seed) >= int(THRESHOLD_DROP * 2**32) - KEY_OFFSET
        weights[block] = torch.where(below, is_kept / (1.0 - THRESHOLD_DROP), 1.0)
    return mean_one(weights, sharding=candidates.sharding, tokens=candidates.tokens)


def _top(keys: Tensor, k: int, seed: Seed, candidates: Candidates) -> tuple[Tensor, int]:
    """:func:`select_top_k`; ties are decided by a hash of the draw's seed and the example's id."""
    return select_top_k(
        keys, k=k, sharding=candidates.sharding, ids=candidates.ids_of, seed=seed, tokens=candidates.tokens
    )


def _keys(keys: BlockValues, candidates: Candidates) -> Tensor:
    """int32 [num_local], stored because they are read several times and are expensive to compute."""
    all_keys = torch.empty(candidates.sharding.num_local, dtype=torch.int32, device=candidates.device)
    for block in blocks(len(all_keys), device=all_keys.device):
        all_keys[block] = keys(block)
    return all_keys


def _keys_of_seen(keys: BlockValues, scores: Scores, seed: Seed, candidates: Candidates) -> Tensor:
    """The keys, int32 [num_local], with the examples never scored above all others."""
    if not scores.has_unseen:
        return _keys(keys, candidates)

    def with_unseen(block: slice) -> Tensor:
        unseen = scores.values[block] == float("inf")
        return unseen_first(keys(block), unseen, ids=candidates.ids_at(block), seed=seed)

    return _keys(with_unseen, candidates)


def choose(
    scores: Scores,
    *,
    k: int,
    config: TeacherConfig,
    seed: Seed,
    candidates: Candidates,
    excluded: Tensor | None = None,
    at_least: int,
) -> Tensor:
    """Apply ``config.strategy``; a collective.

    Args:
        scores: importances of the candidates; -inf where ``excluded``.
        excluded: bool [num_local], candidates that no strategy may select; None for none.
        at_least: if fewer would be selected, all are, with equal weights. "threshold" may select less than a batch, and
            a pass of no steps must not happen. A number of tokens where the candidates have tokens, as k.

    Returns:
        fp32 [num_local] weights, 0 where not selected and above 0 elsewhere, mean 1 over the selected examples of all
            ranks, or over their tokens.
    """
    weights, num_chosen = STRATEGIES[config.strategy](scores, k, config, seed, candidates)
    if excluded is not None:
        weights.masked_fill_(excluded, 0.0)
    if excluded is not None or (config.quarantine_after and is_weighted(config)):
        weights, num_chosen = mean_one(weights, sharding=candidates.sharding, tokens=candidates.tokens)
    return torch.ones_like(weights) if num_chosen < at_least else weights
