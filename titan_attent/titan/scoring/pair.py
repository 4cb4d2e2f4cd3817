"""``python -m titan_attent.score pair``: two small models score the data of a run once, before the run.

    trusted/train, trusted/held_out    rows of the trusted text, split in two (data/text/holdout.py)
    models/amateur, models/expert      for flavors that are trained: runs of titan_attent.train, on the data of the run
                                       and on trusted/train
    amateur/, expert/                  their losses on the data of the run, and in trusted/ below them those on
                                       trusted/held_out: ``teacher.scores`` names the folder that holds both. Models
                                       that count also have their tables in them (scores/table.py)
    scorers.json                       the request and the duration of each stage; cost.json in amateur/ and expert/

Both models are tables of counts (pair_bigram.py), or transformers: the llama3 flavors ``scorer_*``, data-parallel, with
the vocabulary of the data. Each stage of a transformer is a command of this package, in a separate process on every
rank. The first steps of its run are a random sample of its data: nothing is copied.

When a killed command runs again, on any number of ranks, it keeps the finished stages. The interrupted stage resumes
from its last checkpoint or chunk of losses.

Source: Moore and Lewis, ACL 2010; CoLoR-Filter, NeurIPS 2024 (two small models, one conditioned on trusted text).
"""

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.plan.forward_rows import row_lengths
from titan_attent.data.text.document_examples import DOCUMENT, WholeDocuments
from titan_attent.data.text.holdout import hold_out, hold_out_documents
from titan_attent.data.text.spans import length_counts
from titan_attent.data.text.tokenizer_check import check_same_tokenizer
from titan_attent.scores.bigram import check_vocabulary
from titan_attent.scores.provenance import TRUSTED
from titan_attent.scores.stored import COST_FILE, ROLES, SCORES_FILE
from titan_attent.scores.table import has_table
from titan_attent.systems.teaching.checks import MIN_TRUSTED
from titan_attent.titan.dataset_cache import DataSets
from titan_attent.titan.forward_rows import EAGER_LENGTHS
from titan_attent.titan.launch import parse
from titan_attent.titan.owner import LOCK_FILE, own
from titan_attent.titan.scoring.pair_bigram import MAX_TOKENS, Bigrams, ScoredExamples, num_counted
from titan_attent.titan.scoring.pair_plan import (
    HELD_OUT,
    MODEL,
    REPORT_FILE,
    Options,
    announcement,
    cost_of,
    identity,
    parse_options,
    report_of,
    training_toml,
)
from titan_attent.titan.scoring.subcommands import run_on_all_ranks
from titan_attent.titan.train_spec import attent_spec
from titan_attent.titan.user_errors import fail, on_first_rank

MODELS = ROLES
SCORING_BATCHES = 4
"""Rows of a scoring batch per row of a training batch; more fit, since there is no backward pass."""
WAIT_TIMEOUT = timedelta(days=7)
"""How long a rank waits for the stage of the other ranks."""


class PairBuild:
    """The stages, on every rank.

    Args:
        options: the options of the command.
        job_config: the configuration of the run to come; its data, unit, sequence length, precision and seed are read.
    """

    def __init__(self, options: Options, job_config: JobConfig):
        self.options, self.run, self.output = options, job_config, options.output
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not options.is_counted and options.batch_size % self.world_size:
            raise ValueError(
                f"--batch_size {options.batch_size} is not a multiple of the {self.world_size} ranks: make it one"
            )
        self.datasets = DataSets()
        self.spec = attent_spec(MODEL, self.datasets, data=job_config.data.path)
        self.unit = job_config.data.unit
        self.data, self.trusted = (self._examples(path) for path in (job_config.data.path, options.trusted))
        check_same_tokenizer(self.trusted.shards, self.data.shards, what="--trusted ")
        if options.is_counted:
            check_vocabulary(self.data.shards.index.tokenizer["vocab_size"])
        self.report: dict[str, Any] = {}

    def _examples(self, path: str | Path) -> ScoredExamples:
        """The rows to score: windows of the run's length, or whole documents, which serve every length."""
        if self.unit == DOCUMENT:
            return WholeDocuments(self.datasets.shards(path))
        return self.datasets.dataset(path, seq_len=self.run.training.seq_len)

    def _tokens_scored(self) -> int:
        """Tokens of all rows of the data that a scorer reads, padding included (titan/forward_rows.py)."""
        seq_len = self.run.training.seq_len
        if self.unit == DOCUMENT and not self.options.is_counted:
            values, counts = length_counts(self.data.shards, seq_len=seq_len)
            lengths = row_lengths(values, counts, seq_len=seq_len, num=EAGER_LENGTHS)
            return int(counts @ np.array(lengths)[np.searchsorted(lengths, values)])
        return self.data.tokens_per_example * len(self.data)

    # -- the stages -----------------------------------------------------------------------------------------------

    def run_stages(self) -> None:
        """Run all stages that are not done yet. A collective, on all ranks."""
        on_first_rank(self._begin)
        train, held_out = self.output / "trusted" / "train", self.output / "trusted" / "held_out"
        on_first_rank(lambda: self._hold_out(train, held_out))
        if self.options.is_counted:
            self._count_and_score(train, held_out)
        else:
            for name, data in zip(MODELS, (self.run.data.path, str(train)), strict=True):
                self._train(name, data)
            for name in MODELS:
                self._score(name, str(held_out), self.output / name / TRUSTED)
                self._score(name, self.run.data.path, self.output / name)
        on_first_rank(self._finish)

    def _hold_out(self, train: Path, held_out: Path) -> None:
        """Split the trusted text: most of it to train the expert on, the rest to calibrate by. On the first rank."""
        if isinstance(self.trusted, WholeDocuments):
            shards, max_tokens = self.trusted.shards, MAX_TOKENS
            if not self.options.is_counted:
                steps = self.options.steps + 1  # one more than is trained, as packing fills no window to the last token
                max_tokens = steps * self.options.batch_size * self.run.training.seq_len
            hold_out_documents(
                shards,
                train=train,
                held_out=held_out,
                num_held_out=HELD_OUT,
                min_held_out=MIN_TRUSTED,
                max_train_tokens=max_tokens,
            )
            return
        num_train = MAX_TOKENS // self.trusted.seq_len
        if not self.options.is_counted:
            num_train = self.options.steps * self.options.batch_size
        hold_out(self.trusted, train=train, held_out=held_out, num_train=num_train, num_held_out=HELD_OUT)

    def _count_and_score(self, train: Path, held_out: Path) -> None:
        trusted, unseen = (self._examples(path) for path in (train, held_out))
        num = num_counted(
            num_trusted=len(trusted), num_examples=len(self.data), tokens_per_example=self.data.tokens_per_example
        )
        mesh = init_device_mesh("cpu", (self.world_size,), mesh_dim_names=("batch",))
        reader = self.datasets.reader(self.run.data.num_workers)
        for name, counted in zip(MODELS, (self.data, trusted), strict=True):
            outputs = ((unseen, self.output / name / TRUSTED), (self.data, self.output / name))
            missing = [(data, folder) for data, folder in outputs if not (folder / SCORES_FILE).is_file()]
            losses = self.output / name
            if missing or not has_table(losses):  # earlier versions of this package wrote none
                model = Bigrams(counted, num=num, seed=self.run.data.seed, mesh=mesh, reader=reader, role=name)
                self._timed(f"count for the {name}", partial(model.count_into, losses))
                for data, folder in missing:
                    self._timed(_scoring_stage(folder, name), partial(model.score, data, folder))

    def _train(self, name: str, data: str) -> None:
        folder, steps = self.output / "models" / name, self.options.steps
        on_first_rank(lambda: self._write_config(folder, data))
        if not (folder / "checkpoint" / f"step-{steps}" / ".metadata").is_file():
            self._stage(f"train {name}", "titan_attent.train", ["--job.config_file", str(folder / "config.toml")])

    def _score(self, name: str, data: str, losses: Path) -> None:
        if (losses / SCORES_FILE).is_file():
            return
        folder = self.output / "models" / name
        settings = {
            "job.config_file": folder / "config.toml",
            "data.path": data,
            "checkpoint.initial_load_path": folder / "checkpoint" / f"step-{self.options.steps}",
            "validation.local_batch_size": SCORING_BATCHES * self.options.batch_size // self.world_size,
        }
        argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        options = ["checkpoint", "--output", str(losses), "--role", name]
        self._stage(_scoring_stage(losses, name), "titan_attent.score", options + argv)

    def _stage(self, name: str, module: str, argv: list[str]) -> None:
        """Run a command of this package on all ranks; all of them end if it fails on one."""
        self._timed(name, lambda: run_on_all_ranks(module, argv))

    def _timed(self, name: str, stage: Callable[[], None]) -> None:
        on_first_rank(lambda: self._start_clock(name))
        stage()
        on_first_rank(lambda: self._stop_clock(time.time()))

    # -- files, on rank 0 -----------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Refuse a folder that was begun with another request; log the cost."""
        own(self.output / LOCK_FILE, "--output")
        self.output.mkdir(parents=True, exist_ok=True)
        requested = identity(self.options, self.run, data=self.data, trusted=self.trusted)
        self.report = report_of(self.output, requested=requested)
        if "under_way" in self.report:  # a killed command: its stage lasted until the last change of a file
            files = [path for path in self.output.rglob("*") if path.name != LOCK_FILE]
            self._stop_clock(max(path.stat().st_mtime for path in files))
        cost = cost_of(
            self.options,
            self.run,
            num_examples=len(self.data),
            num_trusted=len(self.trusted),
            tokens_per_example=self._tokens_scored() / len(self.data),
            spec=self.spec,
            run_spec=attent_spec(self.run.model.name, self.datasets, data=self.run.data.path),
            num_ranks=self.world_size,
        )
        self.report |= {"asked": requested, "cost": cost}
        logger.info(announcement(self.options, cost))
        self._save()

    def _write_config(self, folder: Path, data: str) -> None:
        text = training_toml(self.options, self.run, folder=folder, data=data, num_ranks=self.world_size)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.toml", text.encode())

    def _start_clock(self, stage: str) -> None:
        logger.info(f"Scorers: {stage}")
        self.report["under_way"] = {"stage": stage, "since": time.time(), "ranks": self.world_size}
        self._save()

    def _stop_clock(self, now: float) -> None:
        clock = self.report.pop("under_way")
        seconds, stage = max(0.0, now - clock["since"]), clock["stage"]
        for name, duration in (("seconds", seconds), ("device_seconds", seconds * clock["ranks"])):
            self.report[name][stage] = self.report[name].get(stage, 0.0) + duration
        self._save()

    def _finish(self) -> None:
        cost = self.report["cost"]
        for name in MODELS:
            stages = [seconds for stage, seconds in self.report["device_seconds"].items() if stage.endswith(name)]
            content = {"device_seconds": sum(stages), "flops": cost["flops"] / len(MODELS)}
            write_atomically(self.output / name / COST_FILE, (json.dumps(content, indent=1) + "\n").encode())
        seconds = sum(self.report["seconds"].values())
        logger.info(
            f"Scorers: done in {seconds:.0f} s. To train with them:\n[teacher]\n"
            f'strategy = "difference"\nscores = "{self.output}"'
        )

    def _save(self) -> None:
        write_atomically(self.output / REPORT_FILE, (json.dumps(self.report, indent=1) + "\n").encode())


def _scoring_stage(losses: Path, name: str) -> str:
    """The name of a scoring stage, which is a key in scorers.json."""
    return f"score {'trusted text' if losses.name == TRUSTED else 'the data'} with the {name}"


def main(argv: list[str]) -> None:
    """Run the command."""
    try:
        options, rest = parse_options(argv)
        build = PairBuild(options, parse(rest))
    except ValueError as error:
        fail(error)
    dist.init_process_group("gloo", timeout=WAIT_TIMEOUT)
    try:
        build.run_stages()
    except ValueError as error:
        fail(error)
    finally:
        dist.destroy_process_group()
