"""Selections within each data source, where a mixture gives every source its share of what is trained.

Each source is a pool of its own: its scores decide its ratio (unless the schedule does), its share of its own examples
is selected by the strategy, and weights average 1 in it. So a source whose losses are all higher, or whose text is all
less like the trusted text, is not selected at the cost of the others; the mixture decides how much of it is trained.

Cost: the collectives of a draw once per source, 8 bytes per local example of a source with several spans, and a copy of
the scores of one source at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from titan_attent.data.plan.source import spans_by_name
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.systems.teaching import schedule
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.ratios import RatioFromScores
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import READ_THE_RATIO, Seed, choose
from titan_attent.systems.teaching.tokens import Tokens


class SourceSharding(ExampleSharding):
    """The examples of one source, as the ranks of ``whole`` own them: not in equal chunks.

    Only what a selection needs is right here: the numbers of examples, the rank and the collectives.
    """

    def __init__(self, whole: ExampleSharding, *, num_examples: int, num_local: int):
        self.num_examples, self.mesh, self.group = num_examples, whole.mesh, whole.group
        self.size, self.rank = whole.size, whole.rank
        self.start, self.stop = 0, num_local


class SourceCandidates(Candidates):
    """The candidates of ``whole`` that are of one source, numbered from 0 on each rank."""

    def __init__(self, whole: Candidates, slots: slice | Tensor, *, sharding: SourceSharding, tokens: Tokens | None):
        self.whole, self.sharding, self.tokens = whole, sharding, tokens
        self.pool, self.owners, self.device = whole.pool, whole.owners, whole.device
        self._slots = slots

    def ids_at(self, block: slice) -> Tensor:
        start, stop, _ = block.indices(self.sharding.num_local)
        return self.ids_of(torch.arange(start, stop, dtype=torch.int64, device=self.device))

    def ids_of(self, slots: Tensor) -> Tensor:
        return self.whole.ids_of(slots + self._slots.start if isinstance(self._slots, slice) else self._slots[slots])


@dataclass(frozen=True)
class SourceDraws:
    """A source as a pool.

    Attributes:
        slots: its slots among this rank's.
        sharding: its examples on all ranks.
        tokens: their tokens; None if all examples are equally long.
        ratios: decides its ratio if the scores do.
    """

    slots: slice | Tensor
    sharding: SourceSharding
    tokens: Tokens | None
    ratios: RatioFromScores

    @property
    def num_counted(self) -> int:
        """Its examples, or their tokens."""
        return self.sharding.num_examples if self.tokens is None else self.tokens.total


@dataclass(frozen=True)
class Chosen:
    """The selections within all sources.

    Attributes:
        weights: fp32 [num_local], 0 where not selected.
        takes_all: the scores leave nothing out of any source.
        num_fallbacks: sources that are trained whole, as a few examples would dominate their selection.
    """

    weights: Tensor
    takes_all: bool
    num_fallbacks: int


def _scores_of(
    all_scores: Callable[[], Scores], slots: slice | Tensor, sharding: SourceSharding, tokens: Tokens | None
) -> Scores:
    """The scores of one source."""
    return Scores(all_scores().values[slots], sharding=sharding, tokens=tokens)


class WithinSources:
    """Selects within each source.

    Args:
        config: the configuration of the teacher.
        sources: the spans of the data set by source.
        proportions: of each source: its mean share of what the run trains; a source with 0 is not selected from.
        whole: how the ranks own the examples.
        tokens: tokens of the examples that this rank owns; None if all are equally long.
        bound: (examples or tokens of a source, its proportion) -> how often the run may train one of its examples.
        trusted: as in :class:`~.draws.Draws`.
        all_scores: as in :class:`~.ratios.RatioFromScores`.
    """

    def __init__(
        self,
        config: TeacherConfig,
        *,
        sources: Sequence[tuple[str, int]],
        proportions: Mapping[str, float],
        whole: ExampleSharding,
        tokens: Tokens | None,
        bound: Callable[[int, float], schedule.RepeatBound],
        trusted: Tensor | None,
        all_scores: Callable[[], Scores],
    ):
        self.config = config
        self.pools: list[SourceDraws] = []
        for name, spans in spans_by_name(sources, num_examples=whole.num_examples).items():
            if not proportions.get(name):
                continue
            parts = [(max(start, whole.start), min(stop, whole.stop)) for start, stop in spans]
            parts = [(start - whole.start, stop - whole.start) for start, stop in parts if start < stop]
            num_local = sum(stop - start for start, stop in parts)
            slots: slice | Tensor = slice(*parts[0]) if parts else slice(0, 0)
            if len(parts) > 1:
                device = None if tokens is None else tokens.local.device
                slots = torch.cat([torch.arange(*part, dtype=torch.int64, device=device) for part in parts])
            num_examples = sum(stop - start for start, stop in spans)
            sharding = SourceSharding(whole, num_examples=num_examples, num_local=num_local)
            own: Tokens | None = None
            if tokens is not None:
                local = tokens.local[slots]
                own = Tokens(local, sharding.total(local.sum(dtype=torch.int64)[None])[0])
            counted = num_examples if own is None else own.total
            ratios = RatioFromScores(
                config,
                size=counted,
                bound=bound(counted, proportions[name]),
                trusted=trusted,
                all_scores=partial(_scores_of, all_scores, slots, sharding, own),
                noun=("examples" if tokens is None else "tokens") + f" of {name}",
            )
            self.pools.append(SourceDraws(slots, sharding, own, ratios))

    def choose(
        self,
        scores: Scores,
        candidates: Candidates,
        *,
        seed: Seed,
        ratio: float | None,
        excluded: Tensor | None,
    ) -> Chosen:
        """Select within each source. A collective.

        Args:
            scores: the scores of all candidates.
            seed: seed of the draw; what is drawn depends on it and on the example's id.
            ratio: the share of each source to select; None if its scores decide it.
            excluded: bool [num_local], candidates that must not be selected; None for none.
        """
        config, weights = self.config, torch.zeros_like(scores.values)
        num_whole = num_fallbacks = 0
        for pool in self.pools:
            own = Scores(scores.values[pool.slots].clone(), sharding=pool.sharding, tokens=pool.tokens)
            left_out = None if excluded is None else excluded[pool.slots]
            own_ratio = pool.ratios.decide(own, batch_size=1) if ratio is None else ratio
            takes_all = ratio is None and own_ratio == 1.0 and excluded is None and config.strategy in READ_THE_RATIO
            share = own.metrics.shifted_share
            falls_back = config.strategy != "random" and share < config.min_effective_sample_size
            num_whole, num_fallbacks = num_whole + takes_all, num_fallbacks + falls_back
            if takes_all or falls_back:
                weights[pool.slots] = 1.0
                continue
            weights[pool.slots] = choose(
                own if left_out is None else own.without(left_out),
                k=schedule.selection_size(pool.num_counted, ratio=own_ratio, batch_size=1),
                config=config,
                seed=seed,
                candidates=SourceCandidates(candidates, pool.slots, sharding=pool.sharding, tokens=pool.tokens),
                excluded=left_out,
                at_least=1,
            )
        return Chosen(weights, num_whole == len(self.pools), num_fallbacks)
