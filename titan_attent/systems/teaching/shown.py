"""Some rows of the first selection as text, for TensorBoard: what the teacher keeps and drops, in words.

The rows are the best and the worst of 256 random candidates, because no rank holds the scores of all. The same 256 on
any number of ranks.

Cost, once per run: an all-reduce of 2 KiB after the first draw, and on the rank that logs a few short reads.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_attent.data.plan.order import Pool
from titan_attent.data.text.decoded import DecodedExamples, TextDataset, escaped
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.draws import Draws
from titan_attent.systems.teaching.statistics import Scores

TAG = "teacher/rows"
NUM_SAMPLED = 256
ROWS_PER_GROUP = 2
MAX_TOKENS = 200
"""Tokens of a row."""


class Sampled(NamedTuple):
    """A sampled candidate."""

    example_id: int
    score: float
    is_kept: bool


def sample(candidates: Candidates, scores: Tensor, weights: Tensor) -> list[Sampled]:
    """Up to ``NUM_SAMPLED`` random candidates, those of the highest scores first. A collective, with a host sync.

    Args:
        scores: fp32 [num_local] of this rank's candidates.
        weights: fp32 [num_local], above 0 where they are kept.
    """
    sharding, size = candidates.sharding, candidates.pool.size
    slots = Pool(size, order=(0, 0, 0), size=size).ids(torch.arange(min(NUM_SAMPLED, size)))
    index = sharding.local_index(slots.to(scores.device), elsewhere=sharding.num_local)
    # One owner adds the bits of a score and all other ranks add zeros, so the sum is exact.
    bits = torch.cat((scores.view(torch.int32), torch.zeros(1, dtype=torch.int32, device=scores.device)))[index]
    kept = torch.cat((weights > 0, torch.zeros(1, dtype=torch.bool, device=weights.device)))[index].int()
    total = sharding.sum(torch.stack((bits, kept))).cpu()
    ids = candidates.pool.ids(slots).tolist()
    rows = zip(ids, total[0].view(torch.float32).tolist(), total[1].tolist(), strict=True)
    return sorted((Sampled(i, score, bool(is_kept)) for i, score, is_kept in rows), key=lambda row: -row.score)


def markdown(rows: Sequence[Sampled], dataset: TextDataset, *, pool_size: int) -> str:
    """The best and the worst of the kept and of the dropped rows, as Markdown.

    Args:
        rows: from :func:`sample`.
        pool_size: number of candidates, for the heading.
    """
    decoded, sources = DecodedExamples(dataset), dataset.sources
    firsts = [first for _, first in sources]
    lines = [f"Of {len(rows)} random examples among {pool_size:,}, those with the highest and the lowest scores."]
    for name, chosen in (
        ("kept", [row for row in rows if row.is_kept]),
        ("dropped", [r for r in rows if not r.is_kept]),
    ):
        groups = (("highest", chosen[:ROWS_PER_GROUP]), ("lowest", chosen[ROWS_PER_GROUP:][-ROWS_PER_GROUP:]))
        for end, group in groups:
            for row in group:
                source = sources[bisect_right(firsts, row.example_id) - 1][0]
                text = escaped(decoded.text(row.example_id, max_tokens=MAX_TOKENS), keep="\n")
                lines += [f"**{name}, {end} scores**: example {row.example_id} of {source}, score {row.score:.4g}"]
                lines += ["\n".join(f"    {line}" for line in text.split("\n"))]  # a block of code: no markup
    return "\n\n".join(lines) + "\n"


def show_first_selection(
    draws: Draws, dataset: TextDataset, log_text: Callable[[str, Callable[[], str]], None]
) -> None:
    """Log the rows of the first draw of the run; a later one, as after a resume, logs nothing.

    Args:
        log_text: see :attr:`~titan_attent.systems.system.Run.log_text`.
    """

    def watch(candidates: Candidates, scores: Scores, weights: Tensor) -> None:
        if draws.num_draws == 1:
            rows = sample(candidates, scores.values, weights)
            log_text(TAG, lambda: markdown(rows, dataset, pool_size=candidates.pool.size))

    draws.watch = watch
