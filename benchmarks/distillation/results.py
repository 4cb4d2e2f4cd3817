"""The results of the distillation experiment: those in its folder, and those of earlier calls and other machines."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation.arms import ARMS
from benchmarks.distillation.problems import PROBLEMS
from titan_attent.data.io.atomic import write_atomically

Result = dict[str, Any]
Key = tuple[str, str, int]
"""Problem, arm, seed."""


def file_of(output: Path, key: Key) -> Path:
    problem, arm, seed = key
    return output / "runs" / problem / arm.replace(" ", "_").replace(",", "") / f"seed-{seed}.json"


def identity_of(key: Key) -> dict[str, Any]:
    """What a result has to agree with: the problem's sizes and the arm."""
    problem, arm, _ = key
    return {"problem": PROBLEMS[problem].identity(), "arm": {k: v for k, v in vars(ARMS[arm]).items() if k != "about"}}


def save(output: Path, key: Key, numbers: dict[str, Any], about: dict[str, Any]) -> None:
    file = file_of(output, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    names = dict(zip(("problem", "arm", "seed"), key, strict=True))
    content = names | numbers | {"identity": identity_of(key)} | about
    write_atomically(file, (json.dumps(content) + "\n").encode())


def gather(output: Path, keys: Sequence[Key], known: dict[Key, Result]) -> dict[Key, Result]:
    """The finished results among ``keys``; ValueError for one of other sizes in the folder."""
    found: dict[Key, Result] = {}
    for key in keys:
        file = file_of(output, key)
        if file.is_file():
            found[key] = json.loads(file.read_text(encoding="utf-8"))
            if found[key]["identity"] != identity_of(key):
                raise ValueError(
                    f"{file} was measured with other sizes than this code has: name another --output, or remove it"
                )
        elif key in known:
            found[key] = known[key]
    return found


def read_known(files: Sequence[Path]) -> dict[Key, Result]:
    """Results that other calls published; those of other sizes are left out, and named on stderr.

    ValueError for a file that is not one of this command.
    """
    known: dict[Key, Result] = {}
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            keyed = [((result["problem"], result["arm"], result["seed"]), result) for result in results]
            identities = [result["identity"] for result in results]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--known {file}: not the results of this command ({type(error).__name__}: {error}): name a .json that "
                "--publish wrote, or DIR/distillation.json"
            ) from error
        left_out = []
        for (key, result), identity in zip(keyed, identities, strict=True):
            if key[0] in PROBLEMS and key[1] in ARMS and identity == identity_of(key):
                known.setdefault(key, result)
            else:
                left_out.append(" ".join(map(str, key)))
        if left_out:
            print(
                f"distillation: {file}: {len(left_out)} of {len(results)} results left out, because their sizes "
                f"differ: {'; '.join(left_out)}",
                file=sys.stderr,
            )
    return known
