"""What the commands of this package share: their options for vectors, and the checked combination they describe."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from titan_attent.edit.checkpoint import Checkpoint, DcpCheckpoint
from titan_attent.edit.combine import Combination, Term
from titan_attent.edit.compare import DTYPES, check_same, without_tokenizer
from titan_attent.edit.expression import Expression
from titan_attent.edit.hugging_face import HuggingFaceCheckpoint
from titan_attent.edit.layers import check_factors, parse_factor
from titan_attent.edit.storage import is_remote
from titan_attent.edit.transforms import LowRank, Pruned, Transform, Unchanged
from titan_attent.titan.checkpoint_folder import is_safetensors


class Parser(argparse.ArgumentParser):
    """A parser that raises its errors as ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the expression, which are before the first option, and the options."""
    first = next((i for i, word in enumerate(argv) if word.startswith("--") or word == "-h"), len(argv))
    return list(argv[:first]), list(argv[first:])


def add_vector_options(parser: argparse.ArgumentParser) -> None:
    """The options that change vectors, and those of Hugging Face folders."""
    vectors = parser.add_argument_group("what becomes of every vector before it is added")
    one = vectors.add_mutually_exclusive_group()
    one.add_argument("--rank", type=int, metavar="K", help="keep K singular values of every matrix")
    one.add_argument("--energy", type=float, metavar="E", help="keep the fewest singular values with this share")
    one.add_argument("--keep", type=float, metavar="F", help="keep the largest entries, this share of every tensor")
    vectors.add_argument(
        "--scale",
        action="append",
        default=[],
        metavar="[N:]LAYERS=FACTOR",
        help="multiply the coefficient (of the N-th vector) in these layers, such as attention=0.5 or layers.0-7=0; "
        "the last one that fits counts",
    )
    hf = parser.add_argument_group("folders of *.safetensors")
    hf.add_argument("--family", default="", metavar="NAME", help="family of the model, such as llama3")
    hf.add_argument("--flavor", default="", metavar="NAME", help="its flavor, such as 8B")


def combination_of(expression: Expression, options: argparse.Namespace, *, dtype: str = "") -> Combination:
    """The checked combination that an expression and the options of :func:`add_vector_options` describe; ValueError."""
    factors = [parse_factor(text, num_vectors=len(expression.vectors)) for text in options.scale]
    if not expression.vectors and (transform_of(options) != Unchanged() or factors):
        raise ValueError("--rank, --energy, --keep and --scale change vectors, and the expression has none")
    operands = open_all(expression.paths, family=options.family, flavor=options.flavor)
    check_same(list(operands.values()), converts=bool(dtype))
    check_factors(factors, list(operands[expression.base].weights))
    # Each vector has a transform of its own: it keeps what it found in a tensor of its vector.
    terms = [Term(one.coefficient, one.checkpoint, one.origin, transform_of(options)) for one in expression.vectors]
    return Combination(operands, expression.base, terms, factors, DTYPES.get(dtype))


def warn_of_tokenizers(combination: Combination) -> None:
    """Say which operands' tokenizers could not be compared."""
    if unknown := without_tokenizer(list(combination.operands.values())):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        print(f"tokenizers are not compared: {', '.join(unknown[:3])}{more} recorded none", file=sys.stderr)


def transform_of(options: argparse.Namespace) -> Transform:
    """The transform that ``--rank``, ``--energy`` or ``--keep`` asks for; ValueError for a value out of range."""
    if options.rank is not None:
        if options.rank < 1:
            raise ValueError(f"--rank {options.rank}: it must be at least 1")
        return LowRank(rank=options.rank)
    for name in ("energy", "keep"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"--{name} {value:g}: it must be above 0 and at most 1")
    if options.energy is not None:
        return LowRank(energy=options.energy)
    return Unchanged() if options.keep is None else Pruned(options.keep)


def open_all(paths: Sequence[str], *, family: str, flavor: str) -> dict[str, Checkpoint]:
    """The checkpoints by path; ValueError as they raise."""
    in_safetensors = [path for path in paths if _is_safetensors(path)]
    opened: dict[str, Checkpoint] = {}
    for path in paths:
        if path in in_safetensors:
            opened[path] = HuggingFaceCheckpoint(path, family=family, flavor=flavor)
        else:
            opened[path] = DcpCheckpoint(path)
    if (family or flavor) and not in_safetensors:
        raise ValueError("--family and --flavor are for folders of *.safetensors, and there is none")
    return opened


def _is_safetensors(path: str) -> bool:
    return not is_remote(path) and not (Path(path) / ".metadata").is_file() and is_safetensors(Path(path))
