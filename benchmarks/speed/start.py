"""How soon ``titan_attent.train`` ends for --help, typos and refusals, against an earlier commit.

    git worktree add ../old COMMIT
    python -m benchmarks.speed.start --old ../old [--output docs/results/cpu/start.json]

Each start is a process, as torchrun starts it, without torchrun's own time. The two commits take turns, in changing
order, on the same interpreter and the same packages. "import torch" is a process that imports torch and ends: no check
that needs torch can be faster. Seconds of CPU depend less on other work of the machine than those of the clock.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import measure

RANK_ZERO = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}


def start(command: list[str], *, folder: Path, status: int) -> tuple[float, float]:
    """(seconds, CPU seconds) of a process, which must end with ``status``."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ | RANK_ZERO, capture_output=True, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status, (command, done.returncode, done.stderr[-2000:])
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="The end of a training command that does not train.")
    parser.add_argument("--old", type=Path, required=True, help="a worktree of the earlier commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args()
    header, train = measure.header(), [sys.executable, "-m", "titan_attent.train"]
    folders = {"old": args.old.resolve(), "new": measure.ROOT}
    describe = ["git", "-C", str(folders["old"]), "describe", "--always", "--dirty"]
    header["versions"]["old"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        typo, refused = Path(temporary) / "typo.toml", Path(temporary) / "refused.toml"
        missing, ratio = Path(temporary) / "missing.toml", Path(temporary) / "ratio.toml"
        typo.write_text("[training]\nstepz = 3\n")
        missing.write_text(f'[model]\nname = "llama3_attent"\n[data]\npath = "{temporary}/none"\n')
        ratio.write_text('[model]\nname = "llama3_attent"\n[teacher]\nstrategy = "hard"\ninitial_ratio = 1.5\n')
        refused.write_text("[training]\nseq_len = -1\n")
        cases: dict[str, tuple[list[str], int]] = {
            "--help": ([*train, "--help"], 0),
            "a typo in the TOML": ([*train, "--job.config_file", str(typo)], 2),
            "a typo in an option": ([*train, "--training.stepz", "3"], 2),
            "a value out of range": ([*train, "--job.config_file", str(refused)], 2),
            "a ratio of the teacher out of range": ([*train, "--job.config_file", str(ratio)], 2),
            "a data folder that does not exist": ([*train, "--job.config_file", str(missing)], 2),
        }
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for i in range(args.rounds):
            for case, (command, status) in cases.items():
                for name in list(folders) if i % 2 else list(folders)[::-1]:
                    found = start(command, folder=folders[name], status=status)
                    times.setdefault((case, name), []).append(found)
            found = start([sys.executable, "-c", "import torch"], folder=measure.ROOT, status=0)
            times.setdefault(("import torch", "new"), []).append(found)
    rows: list[dict[str, Any]] = []
    for case in [*cases, "import torch"]:
        row: dict[str, Any] = {"what": case}
        for i, unit in enumerate(("seconds", "CPU seconds")):
            medians = {
                name: statistics.median(one[i] for one in times[case, name])
                for name in folders
                if (case, name) in times
            }
            old = medians.get("old")
            row |= {f"{unit}, old": old if old is not None else "", unit: medians["new"]}
            row[f"faster by, {unit}"] = old / medians["new"] if old is not None else ""
        rows.append(row)
    settings = {"rounds": args.rounds}
    measurements = {f"{case}, {name}": found for (case, name), found in times.items()}
    measure.publish(args.output, header | {"settings": settings, "rows": rows, "times": measurements}, rows)


if __name__ == "__main__":
    main()
