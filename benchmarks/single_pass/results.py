"""The results of the single-pass experiment: those in its folder, and those of earlier calls and other machines.

``gather`` adds keys that the tables need to a run's ``result.json``:

    scorer_share, scorer_seconds    the cost of both scorers, where the rule reads any: floating point operations as a
                                    share of a full run's, and measured seconds
    kinds                           the loss on each target kind of text, where there are several
    data_fingerprint                name -> fingerprint of the data sets, where the run has not written it itself

A known result (``read_known``) has all of these keys. It replaces a run with equal configuration on equal data.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.runner import load_result
from benchmarks.corpora.stdlib_code import KINDS_FILE
from benchmarks.single_pass.corpora import CORPORA, KINDS
from benchmarks.single_pass.rules import RULES, data_of, kinds_task, rule_task, scored_data, scores_folder


def gather(
    output: Path, *, fingerprints: dict[str, str], known: dict[str, dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """All results below ``output``, and the ``known`` ones that are missing there.

    Raises:
        ValueError: a run was made with another configuration than its rule has now, or on other data.
    """
    results = dict(known or {})
    for path in (output / "runs").glob("*/*/seed-*/result.json"):
        corpus, name, seed = path.parts[-4], path.parts[-3], int(path.parts[-2].removeprefix("seed-"))
        if name not in RULES or corpus not in CORPORA:
            continue
        task = rule_task(corpus, name, seed)
        result = load_result(output, task)
        if result is None:
            continue
        if RULES[name].scorers:
            file = output / scores_folder(scored_data(corpus, RULES[name]), seed) / "scorers.json"
            if not file.is_file():
                continue  # removed since
            scorers = json.loads(file.read_text(encoding="utf-8"))
            result |= {"scorer_share": scorers["cost"]["share"], "scorer_seconds": sum(scorers["seconds"].values())}
        result["kinds"] = losses_by_kind(output, corpus, name, seed)
        data = data_fingerprint(fingerprints, corpus, name, seed)
        if result.setdefault("data_fingerprint", data) != data:
            raise ValueError(
                f"{path.parent} was measured on other data than {output / 'corpora'} has now: name another --output, "
                "or remove this folder"
            )
        results[task.folder] = result
    return [results[folder] for folder in sorted(results)]


def losses_by_kind(output: Path, corpus: str, name: str, seed: int) -> dict[str, float]:
    """Mean loss of each kind of validation row; empty where the corpus has one target kind."""
    file = output / kinds_task(corpus, name, seed).folder / "losses" / "losses.bin"
    if not file.is_file():
        return {}
    losses = np.fromfile(file, "<f4")
    kinds = np.load(output / "corpora" / f"validation-{CORPORA[corpus].name}" / KINDS_FILE)
    return {KINDS[kind]: float(losses[kinds == kind].mean()) for kind in np.unique(kinds)}


def data_fingerprint(fingerprints: dict[str, str], corpus: str, name: str, seed: int) -> dict[str, str | None]:
    """Name -> fingerprint of a run's training and validation data, and of the trusted text where it reads scorers.

    The middle half by the amateur's loss is determined by the corpus and the trusted text.
    """
    rule, target = RULES[name], CORPORA[corpus].name
    data = corpus if rule.data == "middle" else data_of(corpus, rule, seed)
    sets = [data, f"validation-{target}", *([f"trusted-{target}"] if rule.scorers else [])]
    return {part: fingerprints.get(part) for part in sets}


def read_known(files: Sequence[Path], *, output: Path, fingerprints: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Folder of the run -> result, of runs that are not below ``output``; those left out are named on stderr.

    Raises:
        ValueError: a file is not a results.json of this command.
    """
    known: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
            names = [(result["corpus"], result["rule"], result["seed"], result["config"]) for result in results]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--known {file}: not a results.json of this command ({type(error).__name__}: {error}): name the one "
                "that an earlier call wrote"
            ) from error
        left_out = []
        for result, (corpus, name, seed, config) in zip(results, names, strict=True):
            folder = f"runs/{corpus}/{name}/seed-{seed}"
            if folder in known or (output / folder / "result.json").is_file():
                continue
            if (
                name in RULES
                and corpus in CORPORA
                and flat(config) == flat(rule_task(corpus, name, seed).config)
                and result.get("data_fingerprint") == data_fingerprint(fingerprints, corpus, name, seed)
            ):
                known[folder] = result
            else:
                left_out.append(folder.removeprefix("runs/"))
        if left_out:
            print(
                f"evidence: {file}: {len(left_out)} of {len(results)} results left out, because their configuration or "
                f"data differ: {', '.join(left_out)}",
                file=sys.stderr,
            )
    return known


def flat(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The configuration key by key, as load_result compares it."""
    return {f"{name}.{key}": value for name, section in config.items() for key, value in section.items()}
