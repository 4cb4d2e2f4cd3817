"""The facts that a run records in teacher/data.json for the report: its data, its validation and its devices.

    {"path": "data/c4", "validation_path": "data/val",     folders, as the run was given them
     "fingerprint": "9f..", "batch_size": 64, ...          the training data
     "measured": {"validation data": "07..", ...},         if it differs, the validations of two runs are incomparable
     "setting": {"model": "llama3_attent 8B", ...},        other settings that two runs may differ in
     "configured": {"teacher.strategy": "soft", ...},      the keys that are not at their default
     "devices": "8 x NVIDIA H200",
     "losses": ["out/scorers/expert", ...],                folders of precomputed losses that the run reads
     "systems": [{"name": .., "units": .., "panels": ..}], tags that systems of other packages log
     "scorers_flops": 1.2e15}                              FLOPs to compute these losses; null if a folder lacks them

The folder may hold other data by the time of the report. So the report compares the fingerprint before it shows
examples.

Cost: a few small files read at the start of a run, by its first rank.
"""

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object

FILE = "data.json"


@dataclass(frozen=True)
class RunRecord:
    """The recorded facts of a run; earlier versions recorded only the two folders, or no ``configured`` (None)."""

    path: str = ""
    validation_path: str = ""
    fingerprint: str | None = None
    batch_size: int | None = None
    tokens_per_example: int | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    configured: dict[str, Any] | None = None
    devices: str | None = None
    losses: tuple[str, ...] = ()
    systems: tuple[dict[str, Any], ...] = ()
    scorers_flops: float | None = None


def write_run_record(folder: Path, record: RunRecord, *, losses: Collection[str | os.PathLike[str]]) -> None:
    """Write data.json into ``folder``, which is created if it is missing.

    Args:
        folder: DUMP_FOLDER/teacher.
        record: the facts of the run.
        losses: the folders of precomputed losses that the run reads.
    """
    content = asdict(record) | {"losses": [str(path) for path in losses], "scorers_flops": _flops(losses)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, (json.dumps(content) + "\n").encode())


def read_run_record(run: Path) -> RunRecord:
    """The record of the run in the folder ``run``; an empty one if the file is missing or damaged."""
    try:
        content = read_json_object(run / "teacher" / FILE)
    except (OSError, ValueError):
        return RunRecord()

    def get(name: str, expected: type | tuple[type, ...], default: Any = None) -> Any:
        value = content.get(name)
        return value if isinstance(value, expected) and not isinstance(value, bool) else default

    def count(name: str) -> int | None:
        value = get(name, int)
        return value if value is not None and 0 < value < 2**63 else None

    flops = get("scorers_flops", (int, float))
    return RunRecord(
        path=get("path", str, ""),
        validation_path=get("validation_path", str, ""),
        fingerprint=get("fingerprint", str),
        batch_size=count("batch_size"),
        tokens_per_example=count("tokens_per_example"),
        measured=get("measured", dict, {}),
        setting=_scalars(get("setting", dict, {})) or {},
        configured=_scalars(get("configured", dict)),
        devices=get("devices", str),
        losses=tuple(map(str, get("losses", list, []))),
        systems=tuple(system for system in get("systems", list, []) if isinstance(system, dict)),
        scorers_flops=flops if flops is not None and 0 <= flops < 1e300 else None,
    )


def _scalars(values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    return {key: x for key, x in values.items() if isinstance(x, (str, int, float, type(None)))}


def fingerprint_of(folder: str | None) -> str | None:
    """The fingerprint in the index of the data set in ``folder``; None if there is no readable index."""
    try:
        return str(read_json_object(Path(folder) / INDEX_FILE)["fingerprint"]) if folder else None
    except (OSError, ValueError, KeyError):
        return None


def _flops(losses: Collection[str | os.PathLike[str]]) -> float | None:
    """Total FLOPs of computing the losses; None if one of the folders does not record them."""
    total = 0.0
    for folder in losses:
        try:
            flops = typed(float, read_json_object(Path(folder) / "cost.json")["flops"])
        except (OSError, ValueError, KeyError):
            return None
        if flops < 0:
            return None
        total += flops
    return total
