"""The teacher's part of the plan of a run: its phases, how often an example is trained, its memory and its files.

Cost: that of preview.py if scores on disk decide; else nothing.
"""

from titan_attent.data.plan.packed import Packer
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.systems.system import DataFacts, Planned
from titan_attent.systems.teaching.checks import folders_of_scores
from titan_attent.systems.teaching.config import DECIDED_BY_SCORES, WORST_CASE, TeacherConfig
from titan_attent.systems.teaching.importance import reads
from titan_attent.systems.teaching.preview import is_decided_before, preview
from titan_attent.systems.teaching.rule import with_rule
from titan_attent.systems.teaching.schedule import Plan
from titan_attent.systems.teaching.strategies import READ_THE_RATIO

BYTES_PER_RECORD = 20
"""Of the loss buffer (losses/buffer.py): two losses with their steps, and the visit count."""
BYTES_PER_SHARE = 24
"""Of a buffer with mixtures of images; 36 with functional gradients."""


def planned(config: TeacherConfig, facts: DataFacts, *, num_ranks: int) -> Planned:
    """The plan of a teacher that is on."""
    name, config = config.strategy, with_rule(config)
    dataset, steps = facts.dataset, facts.settings.steps
    folders = folders_of_scores(config, facts)
    batch_examples = facts.batch_size
    if isinstance(dataset, DocumentDataset):
        batch_examples = Packer(dataset, batch_size=facts.batch_size).examples_per_batch
    if config.strategy == "uniform":
        line = f'weighting = "{WORST_CASE}": every pass trains all examples; the loss is a norm with q = {config.q:g}'
        return Planned((line,), _bytes_per_rank(config, facts, 0, num_ranks), _files(config))
    phases = Plan(config, steps_of_full_pass=len(dataset) // batch_examples, total_steps=steps, scorers=list(folders))
    warmup = min(phases.warmup_steps, phases.tail_start)
    lines = [
        f'strategy = "{name}": {warmup:,} steps of warm-up, {phases.tail_start - warmup:,} steps of '
        f"selections, {steps - phases.tail_start:,} steps on the full data at the end"
    ]
    if is_decided_before(config):
        lines.append(preview(config, facts, total_steps=max(1, steps), within=facts.proportions).forecast.text)
    elif config.strategy in READ_THE_RATIO and config.ratio_schedule not in DECIDED_BY_SCORES and steps > warmup:
        visits = phases.visits(None, num_examples=len(dataset), batch_size=batch_examples)
        lines.append(f"an example that is always selected is trained {visits:.1f} times")
    else:
        lines.append("the losses of the run decide what is selected, and how often")
    return Planned(tuple(lines), _bytes_per_rank(config, facts, len(folders), num_ranks), _files(config))


def _files(config: TeacherConfig) -> tuple[str, ...]:
    return ("teacher/rounds.jsonl", *("teacher/quarantine.jsonl",) * config.keeps_streaks)


def _bytes_per_rank(config: TeacherConfig, facts: DataFacts, num_scorers: int, num_ranks: int) -> int:
    """Bytes of a full shard: the buffer, the last draw, the weights, scores; and the bitmask of a selection."""
    num = len(facts.dataset)
    with_gradient = "gradient" in reads(config.importance)
    per_example = BYTES_PER_RECORD + 4 * with_gradient + 4 + 4 * num_scorers + 8 * config.keeps_streaks
    if isinstance(facts.dataset, DocumentDataset):
        per_example += 4  # its tokens
    if facts.proportions is not None:
        per_example += 12  # where a source has several spans: its slots and their tokens
    if "share" in facts.dataset.columns:
        per_example += BYTES_PER_SHARE + 12 * with_gradient
    pool = config.pool_size or num
    return -(-num // num_ranks) * per_example + 4 * -(-pool // num_ranks) + pool // 8 + pool // 64
