"""The command ``python -m titan_attent.edit BASE + 0.4 TUNED --output DIR``, also with ``mean`` or ``search`` first."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from titan_attent.data.branch import read_branch
from titan_attent.edit.averages import DECAYS, decay_weights, replaced_decay
from titan_attent.edit.compare import DTYPES
from titan_attent.edit.expression import Expression, Vector, parse
from titan_attent.edit.options import Parser, add_vector_options, combination_of, split_words, warn_of_tokenizers
from titan_attent.edit.output import check_output
from titan_attent.edit.run import total_bytes, write
from titan_attent.titan.checkpoint_folder import steps_in

MEAN, SEARCH = "mean", "search"
_STEP = "step-"
NO_DECAY = "the steps of the checkpoints are unknown or do not rise: the mean stands for no decay of the learning rate"

DESCRIPTION = """\
Arithmetic on checkpoints: task vectors, and means of a run's last checkpoints. Reads DCP checkpoints of any number of
ranks, and folders of *.safetensors; needs no GPU and no torchrun. Writes a model-only checkpoint for
checkpoint.initial_load_path and titan_attent.score checkpoint.

  BASE + 0.4 FT1 - 0.6 FT2      BASE + 0.4 (FT1 - BASE) - 0.6 (FT2 - BASE): the first checkpoint is the base, each other
                                one stands for its difference from the base. Without a number it is 1.
  C + B from A                  the analogy: C + (B - A)
  mean FOLDER --last 8          the mean of the last 8 checkpoints in FOLDER; or mean STEP STEP ..., of those
  search BASE + FT1 ...         tries coefficients on two data sets; see search --help

Every word is an argument of its own; nothing needs quotes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one message for a mistake, or 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == [SEARCH]:
        from titan_attent.edit.search import search  # imports torchtitan

        return search(arguments[1:])
    try:
        _edit(arguments)
    except (ValueError, OSError) as error:
        print(f"titan_attent.edit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("titan_attent.edit: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    return 0


def _parser(is_mean: bool) -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m titan_attent.edit",
        usage="%(prog)s EXPRESSION --output DIR [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", default="", metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument("--dtype", default="", choices=[*DTYPES], help="of the result (default: the base's)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that compute and write (default: 1)")
    add_vector_options(parser)
    mean = parser.add_argument_group("means")
    mean.add_argument("--last", type=int, metavar="N", help="the last N checkpoints of the folder")
    one = mean.add_mutually_exclusive_group()
    one.add_argument("--decay", choices=list(DECAYS), help="weights that replace this decay (default: linear)")
    one.add_argument("--weights", type=float, nargs="+", metavar="W", help="weights, the oldest first; of any sum")
    if is_mean:
        parser.set_defaults(is_mean=True)
    return parser


def _edit(argv: list[str]) -> None:
    words, rest = split_words(argv)
    if not words and not {"-h", "--help"} & set(rest):
        raise ValueError("the expression is missing: give it before the options, such as BASE + 0.4 TUNED; see --help")
    is_mean = words[:1] == [MEAN]
    options = _parser(is_mean).parse_args(rest)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("start it with python -m and not with torchrun: --processes N uses several processes")
    if not options.output:
        raise ValueError("--output is missing: name the folder of the new checkpoint")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: it must be at least 1")
    expression, note = (_mean(words[1:], options), "") if is_mean else (_vectors(words, options), "")
    if isinstance(expression, tuple):
        expression, note = expression
    combination = combination_of(expression, options, dtype=options.dtype)
    check_output(options.output, num_bytes=total_bytes(combination))
    warn_of_tokenizers(combination)
    print(f"{options.output} = {expression}", note, sep="\n" if note else "")
    with tqdm(total=total_bytes(combination), unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        result = write(
            combination,
            options.output,
            expression=str(expression),
            note=note,
            processes=options.processes,
            progress=bar.update,
        )
    print(
        f"{options.output}: {result.num_weights} weights, {result.num_bytes / 1e9:.2f} GB in {result.seconds:.1f} s, "
        f"read back and verified. Train from it with --checkpoint.initial_load_path {shlex.quote(options.output)}"
    )


def _vectors(words: list[str], options: argparse.Namespace) -> Expression:
    for name in ("last", "decay", "weights"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: it is for means; begin with mean, or leave it out")
    return parse(words)


def _mean(words: list[str], options: argparse.Namespace) -> tuple[Expression, str]:
    """The mean as an expression with the first checkpoint as its base, and the decay that it replaces."""
    for name in ("rank", "energy", "keep"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name}: it changes vectors, and a mean has none; leave it out")
    if options.scale:
        raise ValueError("--scale: it changes vectors, and a mean has none; leave it out")
    paths = _last(words, options.last)
    steps = [_step_of(path) for path in paths]
    known = [step for step in steps if step is not None]
    has_order = len(known) == len(paths) and all(a < b for a, b in zip(known, known[1:], strict=False))
    if not has_order:
        if options.decay:
            raise ValueError(
                f"--decay {options.decay}: the steps must be known and rise, and are {', '.join(map(_shown, paths))}: "
                "give folders named step-N from the oldest to the newest, or --weights"
            )
        known = list(range(len(paths)))
    if options.weights is None:
        decay = options.decay or "linear"
        weights = decay_weights(known, decay)
    else:
        decay, weights = "", _normalised(options.weights, len(paths))
    vectors = tuple(Vector(weight, path, paths[0]) for weight, path in zip(weights[1:], paths[1:], strict=True))
    listed = "\n".join(f"  {weight:.4f} {path}" for weight, path in zip(weights, paths, strict=True))
    what = replaced_decay(known, weights, decay=decay) if has_order else NO_DECAY
    return Expression(paths[0], vectors), f"{what}\n{listed}"


def _normalised(weights: list[float], num: int) -> list[float]:
    total = sum(weights)
    if len(weights) != num or total <= 0 or total - total != 0:
        raise ValueError(
            f"--weights: give {num} numbers with a positive sum, one for each checkpoint, the oldest first"
        )
    return [weight / total for weight in weights]


def _last(words: list[str], last: int | None) -> list[str]:
    """The checkpoints of a mean, the oldest first."""
    if not words:
        raise ValueError("mean: name a folder of checkpoints, or the checkpoints")
    if last is None:
        if len(words) == 1 and steps_in(Path(words[0])):
            raise ValueError(f"mean {words[0]}: --last N is missing: of how many of its checkpoints?")
        paths = [word.rstrip("/") or word for word in words]
        if len(set(paths)) < len(paths):
            raise ValueError("mean: a checkpoint is named twice")
        return paths
    if len(words) != 1:
        raise ValueError(f"--last {last}: name one folder of checkpoints before it")
    if last < 1:
        raise ValueError(f"--last {last}: it must be at least 1")
    folder = Path(words[0])
    left = read_branch(folder).left
    found = [step for step, finished in steps_in(folder).items() if finished and step not in left]
    if len(found) < last:
        inside = sorted({path.parent.parent for path in folder.glob("*/step-*/.metadata")})
        fix = f"; give {inside[0]}" if inside and not found else f"; give at most --last {len(found)}" if found else ""
        raise ValueError(f"--last {last}: {folder} holds {len(found)} finished checkpoints of its run{fix}")
    return [str(folder / f"{_STEP}{step}") for step in found[-last:]]


def _step_of(path: str) -> int | None:
    name = path.rstrip("/").rpartition("/")[2]
    number = name.removeprefix(_STEP)
    return int(number) if name.startswith(_STEP) and number.isdigit() else None


def _shown(path: str) -> str:
    return path.rpartition("/")[2]
