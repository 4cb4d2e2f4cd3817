"""What the scorers of a run are: the command's options, the runs that train them, and what they cost."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.text.holdout import MOST
from titan_attent.data.text.shards import TokenDataset
from titan_attent.foundations.toml import to_toml
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object
from titan_attent.scores.bigram import NUM_BUCKETS
from titan_attent.scores.find import PAIR_FILE
from titan_attent.scores.reference import ROLES
from titan_attent.titan.checks.value_checks import check_flavor
from titan_attent.titan.scoring.pair_bigram import num_counted
from titan_attent.titan.train_spec import SCORER_FLAVORS

MODEL = "llama3_attent"
BIGRAM = "bigram"
"""The flavor that is counted, not trained."""
BIGRAM_OPERATIONS = 10
"""Of a token that a bigram model scores."""
HELD_OUT = 2048
"""Trusted examples held out, at most; and at most a quarter of them."""
REPORT_FILE = PAIR_FILE
DURATIONS = ("seconds", "device_seconds")
"""In the report: by stage."""
DEFAULTS = {"steps": 300, "batch_size": 32}
"""Of a flavor that is trained."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own options; the rest of the command line is the run's configuration."""

    trusted: str
    output: Path
    flavor: str
    steps: int
    batch_size: int
    lr: float
    """Of training, like the two before: 0 for bigrams."""

    @property
    def is_counted(self) -> bool:
        return self.flavor == BIGRAM


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m titan_attent.score pair",
        description="Train an amateur and an expert, and score the data of a run with both. A killed command is "
        "resumed by the same command. All other options are those of titan_attent.train, of the run to come.",
        allow_abbrev=False,
        add_help="--help" in argv or "-h" in argv,
    )
    parser.add_argument("--trusted", required=True, metavar="DIR", help="token data set of trusted text")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--flavor",
        default=BIGRAM,
        choices=(BIGRAM, *SCORER_FLAVORS),
        help="two tables of counts, or small transformers, which are trained (default: %(default)s)",
    )
    trained = parser.add_argument_group("transformers alone")
    trained.add_argument("--steps", type=int, help=f"of training, each (default: {DEFAULTS['steps']})")
    trained.add_argument("--batch_size", type=int, help=f"rows of a step (default: {DEFAULTS['batch_size']})")
    trained.add_argument("--lr", type=float, help="peak learning rate (default: 0.64 / width, at most 0.01)")
    found, rest = parser.parse_known_args(argv)
    given = {name: value for name in ("steps", "batch_size", "lr") if (value := getattr(found, name)) is not None}
    if found.flavor == BIGRAM:
        if given:
            raise ValueError(
                f"--{next(iter(given))} with --flavor {BIGRAM}, which is not trained: leave it out, or choose one of "
                f"{', '.join(SCORER_FLAVORS)}"
            )
        return Options(**vars(found) | dict.fromkeys(("steps", "batch_size", "lr"), 0)), rest
    lr = min(0.01, 0.64 / SCORER_FLAVORS[found.flavor][0])
    options = Options(**vars(found) | DEFAULTS | {"lr": lr} | given)
    for name in ("steps", "batch_size", "lr"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} {getattr(options, name)}: it must be above 0")
    return options, rest


def identity(options: Options, run: JobConfig, *, data: TokenDataset, trusted: TokenDataset) -> dict[str, Any]:
    """What decides the losses; a folder holds those of one such choice."""
    asked = asdict(options)
    return {key: asked[key] for key in ("flavor", "steps", "batch_size", "lr")} | {
        "seq_len": data.seq_len,
        "seed": run.debug.seed,
        "data_seed": run.data.seed,
        "precision": run.training.mixed_precision_param,
        "data_fingerprint": data.shards.fingerprint,
        "trusted_fingerprint": trusted.shards.fingerprint,
    }


def report_of(output: Path, *, asked: dict[str, Any]) -> dict[str, Any]:
    """What a command before has left of its report in ``output``, or an empty one.

    Raises:
        ValueError: the folder was begun with something else than ``asked``, or does not tell.
    """
    path, mend = output / REPORT_FILE, "Name another --output, or delete the folder"
    if not path.is_file():
        if found := [name for name in ("trusted", "models", *ROLES) if (output / name).exists()]:
            raise ValueError(
                f"{output}: holds {', '.join(found)}, but no {REPORT_FILE}, which says of which data and models "
                f"they are. {mend}"
            )
        return {name: {} for name in DURATIONS}
    try:
        report = read_json_object(path)
        then = typed(dict[str, Any], report["asked"], where="asked")
        report |= {name: typed(dict[str, float], report[name], where=name) for name in DURATIONS}
        if "under_way" in report:
            clock = typed(dict[str, Any], report["under_way"], where="under_way")
            for name, kind in (("stage", str), ("since", float), ("ranks", int)):
                clock[name] = typed(kind, clock[name], where=name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: malformed ({error}). {mend}") from error
    differing = [
        f"{key} was {then.get(key)!r} and is {value!r}" for key, value in asked.items() if then.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{output}: holds other scorers: {'; '.join(differing)}. Name another --output, or ask for the same "
            "to resume"
        )
    return report


def cost_of(
    options: Options,
    run: JobConfig,
    *,
    num_examples: int,
    num_trusted: int,
    spec: TrainSpec,
    run_spec: TrainSpec,
    num_ranks: int,
) -> dict[str, Any]:
    """In floating point operations, as torchtitan counts them for a training step; a forward is a third of it.

    Args:
        num_examples: of the data.
        num_trusted: of trusted text: examples to train on, and examples held out.
        spec: of the scorers' model, if they are trained.
        run_spec: of the run's; ValueError if it has not the run's flavor.

    Returns:
        ``trained``, examples that each model is made of; ``scored``, those that each scores; ``num_params`` of a
        model, ``flops`` of both, ``run_flops`` and ``run_steps`` of the run to come, and the ``share`` of the first in
        the second.
    """
    seq_len, training = run.training.seq_len, run.training
    held_out = min(HELD_OUT, int(MOST * num_trusted))
    scored = num_examples + held_out
    if options.is_counted:
        trained = num_counted(num_trusted=num_trusted - held_out, num_examples=num_examples, seq_len=seq_len)
        num_params, per_token = NUM_BUCKETS, 3 * BIGRAM_OPERATIONS
    else:
        trained = options.steps * options.batch_size
        num_params, per_token = _flops(spec, options.flavor, seq_len)
    flops = 2 * per_token * seq_len * (trained + scored / 3)
    rows = training.global_batch_size
    if rows < 1:
        rows = training.local_batch_size * num_ranks
    check_flavor(run_spec, model=run.model.name, flavor=run.model.flavor)
    run_flops = _flops(run_spec, run.model.flavor, seq_len)[1] * training.steps * rows * seq_len
    return {
        "trained": trained,
        "scored": scored,
        "num_params": num_params,
        "flops": flops,
        "run_flops": run_flops,
        "run_steps": training.steps,
        "share": flops / run_flops,
    }


def announcement(options: Options, cost: dict[str, Any]) -> str:
    what = f"{MODEL} {options.flavor} of {cost['num_params']:,} parameters, {options.steps} steps each"
    if options.is_counted:
        what = f"of pairs of tokens, {cost['trained']:,} examples counted by each"
    return (
        f"Scorers: two models {what}; then {cost['scored']:,} examples twice: {cost['flops']:.3g} floating point "
        f"operations, {cost['share']:.2%} of the run's {cost['run_flops']:.3g}"
    )


def training_toml(options: Options, run: JobConfig, *, folder: Path, data: str, num_ranks: int) -> str:
    """The configuration of a scorer's training in ``folder`` on ``data``."""
    interval = max(1, options.steps // 10)
    config: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": str(folder), "custom_config_module": "titan_attent.job_config"},
        "model": {"name": MODEL, "flavor": options.flavor},
        "data": {"path": data, "num_workers": run.data.num_workers, "seed": run.data.seed},
        "teacher": {"strategy": "uniform"},
        "training": {
            "local_batch_size": options.batch_size // num_ranks,
            "global_batch_size": options.batch_size,
            "seq_len": run.training.seq_len,
            "steps": options.steps,
            "mixed_precision_param": run.training.mixed_precision_param,
        },
        "optimizer": {"lr": options.lr},
        "lr_scheduler": {"warmup_steps": max(1, options.steps // 20), "decay_type": "linear", "min_lr_factor": 0.0},
        "metrics": {"log_freq": interval, "enable_tensorboard": True},
        "checkpoint": {"enable": True, "interval": interval, "keep_latest_k": 2},
        "activation_checkpoint": {"mode": "none"},
    }
    if run.debug.seed is not None:
        config["debug"] = {"seed": run.debug.seed}
    return to_toml(config)


def _flops(spec: TrainSpec, flavor: str, seq_len: int) -> tuple[int, int]:
    """Parameters of a model, and its floating point operations a token of training."""
    args = spec.model_args[flavor]
    with torch.device("meta"):
        model = spec.model_cls(args)
    return args.get_nparams_and_flops(model, seq_len)
