"""``python -m titan_attent.edit search``: which coefficients help on a target and keep a control data set as it is.

Every vector of the expression is tried with its coefficient times each number of ``--grid``, all combinations of them.
Each is tried as it is, and with random vectors of equal norm in every tensor: what any change of that size does.
The best is the lowest loss on the target (with ``--forget`` the highest) whose loss on the control set is at most
``--budget`` above the base's. No checkpoint is written: the command for the best one is printed.

Each rank reads the boxes of its own shards; torchtitan builds and shards the model (titan/scoring/trials.py).

Cost: the base and every vector twice in memory, sharded as the model; two forward passes per point and arm.
"""

import argparse
import itertools
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_attent.data.io.atomic import write_atomically
from titan_attent.edit.boxes import Box, boxes, overlap, within
from titan_attent.edit.combine import Combination
from titan_attent.edit.expression import Expression, parse
from titan_attent.edit.options import Parser, add_vector_options, combination_of, split_words, warn_of_tokenizers
from titan_attent.edit.search_result import BASE, RANDOM, VECTOR, Found, Trial
from titan_attent.edit.transforms import RandomLike

RESULT_FILE = "search.json"


def search(argv: Sequence[str]) -> int:
    """Run the command; 0, or 2 with one message for a mistake, or 130 when interrupted."""
    try:
        _search(list(argv))
    except (ValueError, OSError) as error:
        print(f"titan_attent.edit: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("titan_attent.edit: interrupted; a search writes its results at its end", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m titan_attent.edit search",
        usage="%(prog)s BASE + TUNED ... --target DATA --control DATA --job.config_file X.toml [options]",
        description="Try coefficients of one or two vectors on a target and a control data set. All other options are "
        "those of titan_attent.train. On several GPUs: torchrun --nproc_per_node=N -m titan_attent.edit search ...",
        allow_abbrev=False,
    )
    parser.add_argument("--target", default="", metavar="DATA", help="data set whose loss is to fall")
    parser.add_argument("--control", default="", metavar="DATA", help="data set whose loss must not rise")
    parser.add_argument("--output", default="", metavar="DIR", help="folder of the table and the picture")
    parser.add_argument(
        "--grid", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], metavar="X", help="factors of coefficients"
    )
    parser.add_argument(
        "--budget", type=float, default=0.01, metavar="NATS", help="rise of the control's loss (default: 0.01)"
    )
    parser.add_argument("--examples", type=int, default=256, metavar="N", help="of each data set (default: 256)")
    parser.add_argument("--forget", action="store_true", help="the target's loss is to rise: unlearning")
    parser.add_argument("--seed", type=int, default=0, help="of the random vectors (default: 0)")
    add_vector_options(parser)
    return parser


def _search(argv: list[str]) -> None:
    words, rest = split_words(argv)
    options, config = _parser().parse_known_args(rest)
    expression = parse(words)
    _check(options, expression)
    if (Path(options.output) / RESULT_FILE).exists():
        raise ValueError(f"--output {options.output} holds a search: name another folder, or delete that one")
    combination = combination_of(expression, options)

    from titan_attent.titan.scoring.trials import open_trials  # imports torchtitan

    data = ["--data.path", options.target, "--data.validation_path", options.control, "--validation.enable"]
    shapes = {name: list(weight.shape) for name, weight in combination.weights.items()}
    warn_of_tokenizers(combination)
    trials = open_trials([*config, *data], shapes, path=expression.base, num_examples=options.examples)
    found = _try_all(trials, combination, options)
    trials.close()
    if torch.distributed.get_rank() == 0:
        _report(found, expression, options)
    torch.distributed.destroy_process_group()


def _check(options: argparse.Namespace, expression: Expression) -> None:
    for name in ("target", "control", "output"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing; see search --help")
    if not 1 <= len(expression.vectors) <= 2:
        raise ValueError(f"a search tries one or two vectors, and the expression has {len(expression.vectors)}")
    if options.examples < 1:
        raise ValueError(f"--examples {options.examples}: it must be at least 1")
    if options.budget < 0 or options.budget - options.budget != 0:
        raise ValueError(f"--budget {options.budget:g}: it must be at least 0")
    if len(set(options.grid)) < len(options.grid) or any(x - x != 0 for x in options.grid) or not any(options.grid):
        raise ValueError("--grid: give different finite numbers, one of them not 0: the base is tried in any case")
    folder = Path(options.output).absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"--output {options.output}: cannot be written, because {nearest} is no writable folder")


def _try_all(trials: Any, combination: Combination, options: argparse.Namespace) -> Found:
    """The losses of all points of both arms. A collective, on all ranks."""
    base = _filled(trials.weights, replace(combination, terms=()))
    grid = sorted({0.0, *options.grid})
    points = [point for point in itertools.product(grid, repeat=len(combination.terms)) if any(point)]

    def losses(arm: str, vectors: Sequence[Mapping[str, Tensor]], factors: tuple[float, ...]) -> Trial:
        for name, weight in trials.weights.items():
            total = base[name].clone()
            for factor, vector in zip(factors, vectors, strict=True):
                total.add_(vector[name], alpha=factor)
            _local(weight).copy_(total)
        return Trial(arm, factors, trials.mean_loss("target"), trials.mean_loss("control"))

    start = losses(BASE, (), ())
    start = replace(start, factors=(0.0,) * len(combination.terms))
    found = []
    for arm in (VECTOR, RANDOM):
        vectors = [
            _filled(trials.weights, _alone(combination, number, arm, options.seed))
            for number in range(len(combination.terms))
        ]
        found += [losses(arm, vectors, point) for point in points]
    return Found(start, tuple(found), start.control + options.budget, options.forget)


def _alone(combination: Combination, index: int, arm: str, seed: int) -> Combination:
    """A vector with its coefficient, without the base; or a random one of its norm."""
    term = combination.terms[index]
    if arm == RANDOM:
        term = replace(term, transform=RandomLike(term.transform, seed=seed + index))
    factors = [replace(factor, vector=0) for factor in combination.factors if factor.vector in (0, index + 1)]
    return replace(combination, base="", terms=(term,), factors=factors)


def _filled(weights: Mapping[str, Tensor], combination: Combination) -> dict[str, Tensor]:
    """The values of ``combination`` in this rank's shards of ``weights``, fp32 on their device."""
    filled = {}
    for name, weight in weights.items():
        shard = _shard(weight)
        values = torch.zeros([stop - start for start, stop in shard], dtype=torch.float32)
        for box in boxes(weight.shape):
            shared = overlap(box, shard) if shard else ()
            if shared is not None:
                values[within(shared, shard)] = combination.read(name, box)[within(shared, box)].float()
        filled[name] = values.to(_local(weight).device)
    return filled


def _local(weight: Any) -> Tensor:
    return weight.to_local() if hasattr(weight, "to_local") else weight


def _shard(weight: Any) -> Box:
    """The box of a weight that this rank holds."""
    if not hasattr(weight, "to_local"):
        return tuple((0, size) for size in weight.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return tuple((start, start + size) for start, size in zip(offset, shape, strict=True))


def _report(found: Found, expression: Expression, options: argparse.Namespace) -> None:
    """Print the table and the best command, and write search.json, table.md and map.png."""
    from titan_attent.edit.search_report import draw, table

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = table(found, expression)
    best = found.best(VECTOR)
    content = {
        "expression": str(expression),
        "target": options.target,
        "control": options.control,
        "examples": options.examples,
        "budget": options.budget,
        "best": asdict(best),
        "best_random": asdict(found.best(RANDOM)),
        **asdict(found),
    }
    write_atomically(folder / RESULT_FILE, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / "table.md", ("\n".join(lines) + "\n").encode())
    draw(found, expression, folder / "map.png")
    print("\n".join(lines))
    if not any(best.factors):
        print("\nno coefficients within the budget are better than the base")
        return
    command = [expression.base]
    for factor, vector in zip(best.factors, expression.vectors, strict=True):
        coefficient = factor * vector.coefficient
        if coefficient:
            origin = [] if vector.origin == expression.base else ["from", vector.origin]
            command += ["-" if coefficient < 0 else "+", f"{abs(coefficient):g}", vector.checkpoint, *origin]
    print(f"\nbest: python -m titan_attent.edit {shlex.join(command)} --output DIR, with the same options for vectors")
