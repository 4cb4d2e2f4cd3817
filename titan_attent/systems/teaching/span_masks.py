"""``[teacher] level = "span"`` as a system of a run: bad spans of a window have no loss, and every window is trained.

    start of the run    a sample of windows of the data, and of the trusted held-out text -> the cut (spans.py)
    each batch read     labels of spans below the cut become IGNORE_INDEX, in the reader threads

The order is that of a uniform run, and the step and loss are torchtitan's own. There is no state: the cut depends on
the data, the tables and ``seed``, and a mask on the tokens of its window. So both are the same on every number of ranks
and after a resume.

Cost: per rank 128 MiB + 24 bytes per id for the two tables; at the start two reads of at most ``SAMPLE_TOKENS`` tokens
and some seconds of one core; per batch the reader threads' time to judge its tokens. Nothing per example.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from titan_attent.data.plan.order import OrderCursor
from titan_attent.data.text.shards import TokenDataset, TokenShards
from titan_attent.foundations.json_lines import JsonLines
from titan_attent.foundations.sharding import is_first_rank
from titan_attent.scores.provenance import TRUSTED
from titan_attent.scores.stored import AMATEUR, EXPERT
from titan_attent.scores.table import AGAIN, StoredTable
from titan_attent.systems.system import Columns, DataFacts, Panel, Run, System
from titan_attent.systems.teaching import checks
from titan_attent.systems.teaching.config import TeacherConfig
from titan_attent.systems.teaching.config_checks import SPAN, check_scores_named
from titan_attent.systems.teaching.rule import with_rule
from titan_attent.systems.teaching.spans import MIN_KEPT, Decision, SpanMasker, decide_cut, has_boundaries

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 2**21
"""Largest number of tokens of the data, and of trusted text, by which the cut is found; at least one window each."""
WINDOWS_AT_ONCE = 16
"""Windows of a sample that are read at once."""
TAG = "teacher/tokens_masked"
LOG_FILE = "spans.jsonl"


class SpanMasks(System):
    """The system of ``[teacher] level = "span"``."""

    name = "teacher"
    panels = (Panel("share of the labels whose loss is masked", (TAG,), shares=True),)
    tag_units = {TAG: "share"}

    config: TeacherConfig

    @classmethod
    def is_on(cls, config: TeacherConfig) -> bool:
        return config.level == SPAN

    @classmethod
    def check_values(cls, config: TeacherConfig) -> None:
        if cls.is_on(config):
            check_scores_named(config)

    @classmethod
    def check_data(cls, config: TeacherConfig, facts: DataFacts) -> None:
        if not isinstance(facts.dataset, TokenDataset):
            raise ValueError(
                f'[teacher] level = "{SPAN}" masks documents inside windows of text, and this run has no such windows: '
                'set level = "example", or for text data.unit = "window"'
            )
        checks.check_data(with_rule(config), facts)
        stored_tables(config, facts)
        held_out_text(config, facts)

    def __init__(self, run: Run, config: TeacherConfig):
        super().__init__(run, with_rule(config))
        self.log: JsonLines | None = None
        paths = self.folders_read()
        seconds = sum(run.open_scores(path).device_seconds for path in paths)
        run.ledger.prepaid_seconds = seconds / int(os.environ.get("WORLD_SIZE", "1"))
        tables = {role: table.load() for role, table in stored_tables(self.config, run).items()}
        assert isinstance(run.dataset, TokenDataset)
        datasets = run.dataset, held_out_text(self.config, run)
        samples = [sample_of(dataset, self.config.seed) for dataset in datasets]
        eos_id = run.dataset.shards.tokenizer_info["eos_id"]
        self.by_documents = any(
            has_boundaries(run.dataset.batch(ids)[0], eos_id=eos_id) for ids in samples[0].split(WINDOWS_AT_ONCE)
        )
        self.masker = SpanMasker(tables[AMATEUR], tables[EXPERT], eos_id=eos_id if self.by_documents else None)
        data, trusted = (means_of(dataset, ids, self.masker) for dataset, ids in zip(datasets, samples, strict=True))
        self.decision = decide_cut(data.flatten(), trusted.flatten())
        self.masked_share, self.shares = 0.0, dict[str, float]()
        if self.decision.cut is not None:
            masked = (data < self.decision.cut).double().mean(dim=1)
            self.masked_share = float(masked.mean())
            self.shares = shares_by_source(run.dataset.sources, samples[0], masked)
        if not self.config.dry_run:
            self.masker.cut = self.decision.cut
        if is_first_rank():
            self._log_decision()

    def folders_read(self) -> Sequence[str]:
        return list(checks.folders_of_scores(self.config, self.run).values())

    def _log_decision(self) -> None:
        decision = self.decision
        if decision.cut is not None:
            logger.warning(describe(decision, self.masked_share, self.shares, dry_run=self.config.dry_run))
        elif decision.is_foreign:
            logger.warning(
                "The run masks nothing and trains on all tokens, like a uniform run: the trusted text is of another "
                f"kind than the data. The {decision.requested:.2%} of the tokens that are closest to it score as high "
                f"as trusted text with a probability of {decision.likeness:.1%}; for text of the same kind it is 50%. "
                "Write new scores (torchrun -m titan_attent.score pair) with trusted text of the kinds that you want"
            )
        else:
            logger.info(
                "Teacher: no span is masked, and the run is uniform: less than a tenth of the tokens would be saved"
            )

    def before_first_step(self) -> None:
        if is_first_rank():
            step = self.run.step()
            self.log = JsonLines(self.run.settings.dump_folder / "teacher" / LOG_FILE, step=step)
            if self.log.path.stat().st_size == 0:  # a resume finds the line of the same cut
                by_source = {f"{TAG}/{name}": share for name, share in self.shares.items()}
                self.log.write({"step": step + 1, "cut": self.decision.cut, TAG: self.masked_share, **by_source})

    def mark_labels(self, example_ids: Tensor, inputs: Columns, labels: Tensor) -> Tensor:
        return self.masker.mark(inputs["input"], labels)

    def metrics(self) -> dict[str, float]:
        run = self.run
        return {TAG: 1.0 - run.num_labels() / (run.batch_size * run.settings.seq_len)}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def stored_tables(config: TeacherConfig, facts: DataFacts) -> dict[str, StoredTable]:
    """The tables of both scorers: role -> table.

    Raises:
        ValueError: a scorer has no table, or a table is damaged, or it is of another model or vocabulary.
    """
    assert isinstance(facts.dataset, TokenDataset)
    tables, vocab_size = {}, facts.dataset.shards.tokenizer_info["vocab_size"]
    for role, folder in checks.folders_of_scores(with_rule(config), facts).items():
        scoring = facts.open_scores(folder).scoring
        if scoring.model != "bigram":
            raise ValueError(
                f'[teacher] level = "{SPAN}" with scores = {config.scores}: its {role} is {scoring.model}, and only '
                "bigram scorers have a loss of every token at no forward pass. Write new scores with torchrun -m "
                "titan_attent.score pair, without --flavor"
            )
        tables[role] = table = StoredTable(folder)
        if table.info.checkpoint_sha256 != scoring.checkpoint_sha256 or table.info.vocab_size != vocab_size:
            raise ValueError(
                f"{folder}: its table has {table.info.vocab_size} ids and was counted by the model "
                f"{table.info.checkpoint_sha256[:12]}, but the losses beside it are of the model "
                f"{scoring.checkpoint_sha256[:12]}, and the data has {vocab_size} ids: files of two pairs were mixed. "
                f"Copy the folder again, or {AGAIN}"
            )
    return tables


def held_out_text(config: TeacherConfig, facts: DataFacts) -> TokenDataset:
    """The windows of the trusted held-out text in the folder of the scores.

    Raises:
        ValueError: it is missing or damaged, or not the text that the scores are calibrated by.
    """
    path = Path(config.scores) / "trusted" / "held_out"
    try:
        dataset = TokenDataset(TokenShards(path), seq_len=facts.dataset.seq_len)
    except ValueError as error:
        raise ValueError(
            f'[teacher] level = "{SPAN}" reads the trusted held-out text beside the scores: {error}. Copy the whole '
            "folder that torchrun -m titan_attent.score pair wrote"
        ) from error
    expert = checks.folders_of_scores(with_rule(config), facts)[EXPERT]
    fingerprint = facts.open_scores(str(Path(expert) / TRUSTED)).scoring.data_fingerprint
    if dataset.stored.fingerprint != fingerprint:
        raise ValueError(f"{path}: is not the text that {expert}/{TRUSTED} holds losses of. Copy the folder again")
    return dataset


def sample_of(dataset: TokenDataset, seed: int) -> Tensor:
    """int64 [n], the ids of a keyed random sample of windows, in ascending order."""
    num = min(len(dataset), max(1, SAMPLE_TOKENS // dataset.seq_len))
    sample = OrderCursor(len(dataset), seed)
    sample.take(num)
    return sample.pool().ids(torch.arange(num)).sort().values


def means_of(dataset: TokenDataset, ids: Tensor, masker: SpanMasker) -> Tensor:
    """fp64 [n, L], the mean difference of the span of each label of the windows ``ids``."""
    return torch.cat([masker.means(*dataset.batch(part)) for part in ids.split(WINDOWS_AT_ONCE)])


def shares_by_source(sources: Sequence[tuple[str, int]], ids: Tensor, masked: Tensor) -> dict[str, float]:
    """Source -> mean of ``masked`` over the windows ``ids`` of it; sources without a window are left out.

    Args:
        sources: the spans of the data set by source, see :class:`~titan_attent.data.examples.Examples`.
        ids: int64 [n].
        masked: fp64 [n], the share of each window's labels.
    """
    names, firsts = zip(*sources, strict=True)
    span = torch.searchsorted(torch.tensor(firsts), ids, right=True) - 1
    by_name: dict[str, list[float]] = {}
    for number, share in zip(span.tolist(), masked.tolist(), strict=True):
        by_name.setdefault(names[number], []).append(share)
    return {name: sum(shares) / len(shares) for name, shares in sorted(by_name.items())}


def describe(decision: Decision, masked_share: float, shares: dict[str, float], *, dry_run: bool) -> str:
    """The log line about the cut."""
    by_source = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return (
        f"Teacher: spans whose difference is below {decision.cut:.4f} nats {'would be' if dry_run else 'are'} masked, "
        f"{masked_share:.1%} of the tokens in a sample. Masked share by source: {by_source}"
        + (
            f". The scores ask for {decision.requested:.1%} of the tokens; at least {MIN_KEPT:.0%} keep their loss"
            if decision.requested < MIN_KEPT
            else ""
        )
        + ". Masked labels are lost, and no compute is saved: in docs/results/long_windows.md such runs end behind "
        "uniform training"
    )
