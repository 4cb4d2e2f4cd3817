"""The scorers of a run: the command's options, the configuration of their training, and their cost."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from titan_attent.data.text.document_examples import DOCUMENT
from titan_attent.data.text.holdout import MAX_HELD_OUT
from titan_attent.foundations.toml import to_toml
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object
from titan_attent.scores.bigram import NUM_BUCKETS
from titan_attent.scores.find import PAIR_FILE
from titan_attent.scores.stored import ROLES
from titan_attent.titan.checks.value_checks import check_flavor
from titan_attent.titan.models.flavors import SCORER_FLAVORS
from titan_attent.titan.scoring.pair_bigram import ScoredExamples, num_counted

MODEL = "llama3_attent"
BIGRAM = "bigram"
"""The flavor that counts instead of training."""
BIGRAM_OPERATIONS = 10
"""Operations per token that a bigram model scores."""
HELD_OUT = 2048
"""Largest number of trusted examples held out; at most a quarter of all are."""
REPORT_FILE = PAIR_FILE
DURATIONS = ("seconds", "device_seconds")
"""Keys of the report with a duration per stage."""
DEFAULTS = {"steps": 300, "batch_size": 32}
"""Defaults for a flavor that is trained."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's own options; all other arguments are the run's configuration."""

    trusted: str
    output: Path
    flavor: str
    steps: int
    """Training steps of each model; 0 for bigrams."""
    batch_size: int
    """Rows per training step; 0 for bigrams."""
    lr: float
    """Peak learning rate; 0 for bigrams."""

    @property
    def is_counted(self) -> bool:
        return self.flavor == BIGRAM


def parse_options(argv: list[str]) -> tuple[Options, list[str]]:
    """The command's own options, and all other arguments; ValueError for options that contradict each other."""
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
    trained = parser.add_argument_group("only for transformers")
    trained.add_argument("--steps", type=int, help=f"training steps of each model (default: {DEFAULTS['steps']})")
    trained.add_argument("--batch_size", type=int, help=f"rows per step (default: {DEFAULTS['batch_size']})")
    trained.add_argument("--lr", type=float, help="peak learning rate (default: 0.64 / width, at most 0.01)")
    parsed, rest = parser.parse_known_args(argv)
    given = {name: value for name in ("steps", "batch_size", "lr") if (value := getattr(parsed, name)) is not None}
    if parsed.flavor == BIGRAM:
        if given:
            raise ValueError(
                f"--{next(iter(given))} with --flavor {BIGRAM}, which is not trained: leave it out, or choose one of "
                f"{', '.join(SCORER_FLAVORS)}"
            )
        return Options(**vars(parsed) | dict.fromkeys(("steps", "batch_size", "lr"), 0)), rest
    lr = min(0.01, 0.64 / SCORER_FLAVORS[parsed.flavor][0])
    options = Options(**vars(parsed) | DEFAULTS | {"lr": lr} | given)
    for name in ("steps", "batch_size", "lr"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} {getattr(options, name)}: it must be above 0")
    return options, rest


def identity(options: Options, run: JobConfig, *, data: ScoredExamples, trusted: ScoredExamples) -> dict[str, Any]:
    """Everything that determines the losses; a folder holds those of one such request."""
    values = asdict(options)
    return {key: values[key] for key in ("flavor", "steps", "batch_size", "lr")} | {
        "seq_len": data.seq_len if options.is_counted else run.training.seq_len,
        "seed": run.debug.seed,
        "data_seed": run.data.seed,
        "precision": run.training.mixed_precision_param,
        "data_fingerprint": data.stored.fingerprint,
        "trusted_fingerprint": trusted.stored.fingerprint,
    }


def report_of(output: Path, *, requested: dict[str, Any]) -> dict[str, Any]:
    """The report that an earlier command left in ``output``, or an empty one.

    Raises:
        ValueError: the folder was begun with another request than ``requested``, or does not say with which.
    """
    path, fix = output / REPORT_FILE, "Name another --output, or delete the folder"
    if not path.is_file():
        if existing := [name for name in ("trusted", "models", *ROLES) if (output / name).exists()]:
            raise ValueError(
                f"{output}: holds {', '.join(existing)}, but no {REPORT_FILE}, which would say from which data and "
                f"models they are. {fix}"
            )
        return {name: {} for name in DURATIONS}
    try:
        report = read_json_object(path)
        stored = typed(dict[str, Any], report["asked"], where="asked")
        report |= {name: typed(dict[str, float], report[name], where=name) for name in DURATIONS}
        if "under_way" in report:
            clock = typed(dict[str, Any], report["under_way"], where="under_way")
            for name, kind in (("stage", str), ("since", float), ("ranks", int)):
                clock[name] = typed(kind, clock[name], where=name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: malformed ({error}). {fix}") from error
    differing = [
        f"{key} was {stored.get(key)!r} and is {value!r}"
        for key, value in requested.items()
        if stored.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{output}: holds other scorers: {'; '.join(differing)}. Name another --output, or use the former values "
            "to resume"
        )
    return report


def cost_of(
    options: Options,
    run: JobConfig,
    *,
    num_examples: int,
    num_trusted: int,
    tokens_per_example: float,
    spec: TrainSpec,
    run_spec: TrainSpec,
    num_ranks: int,
) -> dict[str, Any]:
    """The cost in floating point operations, as torchtitan counts them for a training step; a forward pass is a third
    of it.

    Args:
        num_examples: size of the data.
        num_trusted: number of examples of trusted text, for training and held out.
        tokens_per_example: the mean number of tokens that a scorer reads of an example, padding included.
        spec: of the scorers' model, if they are trained.
        run_spec: of the run's model; ValueError if it does not have the run's flavor.

    Returns:
        ``trained``, number of examples, or rows of a transformer, that each model is built from; ``scored``, number
            that each scores; ``num_params`` of a model; ``flops`` of both; ``run_flops`` and ``run_steps`` of the run
            to come; and ``share``, flops / run_flops.
    """
    seq_len, training = run.training.seq_len, run.training
    held_out = min(HELD_OUT, int(MAX_HELD_OUT * num_trusted))
    scored = num_examples + held_out
    if options.is_counted:
        trained = num_counted(
            num_trusted=num_trusted - held_out, num_examples=num_examples, tokens_per_example=int(tokens_per_example)
        )
        num_params, per_token = NUM_BUCKETS, 3 * BIGRAM_OPERATIONS
        tokens_trained = trained * tokens_per_example
    else:
        trained = options.steps * options.batch_size
        num_params, per_token = _flops(spec, options.flavor, seq_len)
        tokens_trained = trained * seq_len
    flops = 2 * per_token * (tokens_trained + tokens_per_example * scored / 3)
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
    """The log line about the work to come and its cost."""
    training = f"trains two models {MODEL} {options.flavor} of {cost['num_params']:,} parameters, {options.steps} steps"
    if options.is_counted:
        training = f"counts pairs of tokens for two models, {cost['trained']:,} examples"
    return (
        f"Scorers: this command {training} each. Then each scores {cost['scored']:,} examples. This costs "
        f"{cost['flops']:.3g} floating point operations, {cost['share']:.2%} of the run's {cost['run_flops']:.3g}"
    )


def training_toml(options: Options, run: JobConfig, *, folder: Path, data: str, num_ranks: int) -> str:
    """The configuration of a scorer's training in ``folder`` on ``data``."""
    interval = max(1, options.steps // 10)
    config: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": str(folder), "custom_config_module": "titan_attent.job_config"},
        "model": {"name": MODEL, "flavor": options.flavor},
        "data": {"path": data, "num_workers": run.data.num_workers, "seed": run.data.seed}
        | ({"unit": DOCUMENT} if run.data.unit == DOCUMENT else {}),
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
    """Parameters of a model, and its floating point operations per token of training."""
    args = spec.model_args[flavor]
    with torch.device("meta"):
        model = spec.model_cls(args)
    return args.get_nparams_and_flops(model, seq_len)
