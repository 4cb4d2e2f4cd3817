"""What a run tells of itself in teacher/data.json, for the report: which data it saw, what its validation measures, on
which devices it ran.

    {"path": "data/c4", "validation_path": "data/val",     folders, as the run was given them
     "fingerprint": "9f..", "batch_size": 64, ...          what was trained
     "measured": {"validation data": "07..", ...},         where it differs, two runs' validations do not compare
     "setting": {"model": "llama3_attent 8B", ...},        what else two runs may differ in
     "devices": "8 x NVIDIA H200",
     "losses": ["out/scorers/expert", ...],                folders of losses on disk that it reads
     "scorers_flops": 1.2e15}                              what making them took; null if a folder does not tell

A folder says where the data were, the fingerprint which they were: it is compared before anything is shown of them.

Cost: a few small files read at the start of a run, by its first rank.
"""

import json
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from titan_attent.data.io.atomic import write_atomically
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.foundations.typed import typed
from titan_attent.foundations.versioned_json import read_json_object

FILE = "data.json"


@dataclass(frozen=True)
class Told:
    """What a run told, as far as it did: earlier versions told the two folders alone."""

    path: str = ""
    fingerprint: str | None = None
    batch_size: int | None = None
    tokens_per_example: int | None = None
    measured: dict[str, Any] = field(default_factory=dict)
    setting: dict[str, Any] = field(default_factory=dict)
    devices: str | None = None
    losses: tuple[str, ...] = ()
    scorers_flops: float | None = None


def tell(folder: Path, run: Any, *, losses: Collection[str | os.PathLike[str]]) -> None:
    """Write data.json into ``folder``, which is made.

    Args:
        folder: DUMP_FOLDER/teacher.
        run: :class:`~titan_attent.systems.system.Run`.
        losses: the folders of losses on disk that the run reads.
    """
    job, dataset = run.job_config, run.dataset
    name, steps = _key(job, "model.name"), _key(job, "validation.steps")
    measured = {
        "validation data": _fingerprint(_key(job, "data.validation_path")),
        "validated examples": steps * run.batch_size if steps is not None and steps > 0 else "all",
        "learner": {"vit_attent": "classifier", "mae_attent": "autoencoder"}.get(str(name), "language model"),
    }
    if measured["learner"] == "language model":
        measured["validation.seq_len"] = _key(job, "validation.seq_len")
    else:
        measured["image size"] = dataset.seq_len
    if measured["learner"] == "autoencoder":
        measured |= {key: _key(job, key) for key in ("vision.mask_ratio", "vision.normalize_patches")}
        measured["patches"] = dataset.tokens_per_example
        if not _key(job, "vision.normalize_patches"):  # pixels are in units of the std of the training images
            measured["training data"] = dataset.stored.fingerprint
    content = {
        "path": _key(job, "data.path"),
        "validation_path": _key(job, "data.validation_path"),
        "fingerprint": dataset.stored.fingerprint,
        "batch_size": run.batch_size,
        "tokens_per_example": dataset.tokens_per_example,
        "measured": measured,
        "setting": {
            "model": f"{name} {_key(job, 'model.flavor')}",
            "data": dataset.stored.fingerprint,
            "global batch": run.batch_size,
            "tokens of an example": dataset.tokens_per_example,
            "training.steps": _key(job, "training.steps"),
            "optimizer.lr": _key(job, "optimizer.lr"),
            "debug.seed": _key(job, "debug.seed"),
            "data.seed": _key(job, "data.seed"),
        },
        "devices": _devices(run.device),
        "losses": [str(path) for path in losses],
        "scorers_flops": _flops(losses),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, (json.dumps(content) + "\n").encode())


def read_told(run: Path) -> Told:
    """What the run in the folder ``run`` told; nothing where it did not, or where the file is damaged."""
    try:
        content = read_json_object(run / "teacher" / FILE)
    except (OSError, ValueError):
        return Told()

    def get(name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = content.get(name)
        return value if isinstance(value, kind) and not isinstance(value, bool) else default

    def count(name: str) -> int | None:
        value = get(name, int)
        return value if value is not None and 0 < value < 2**63 else None

    flops = get("scorers_flops", (int, float))
    return Told(
        path=get("path", str, ""),
        fingerprint=get("fingerprint", str),
        batch_size=count("batch_size"),
        tokens_per_example=count("tokens_per_example"),
        measured=get("measured", dict, {}),
        setting={key: x for key, x in get("setting", dict, {}).items() if isinstance(x, (str, int, float, type(None)))},
        devices=get("devices", str),
        losses=tuple(map(str, get("losses", list, []))),
        scorers_flops=flops if flops is not None and 0 <= flops < 1e300 else None,
    )


def _key(job_config: Any, name: str) -> Any:
    """The value of ``section.key``; None where there is none."""
    section, key = name.split(".")
    return getattr(getattr(job_config, section, None), key, None)


def _fingerprint(folder: str | None) -> str | None:
    """Of the data set in a folder, as its index says."""
    try:
        return str(read_json_object(Path(folder) / INDEX_FILE)["fingerprint"]) if folder else None
    except (OSError, ValueError, KeyError):
        return None


def _devices(device: torch.device) -> str:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cuda":
        return f"{world} x {torch.cuda.get_device_name(device)}"
    return f"{world} x {device.type} of {platform.node()}"


def _flops(losses: Collection[str | os.PathLike[str]]) -> float | None:
    """Floating point operations of making them; None if one of the folders does not tell."""
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
