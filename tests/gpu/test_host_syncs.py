"""Does the host wait for the device anywhere in a teaching step where torchtitan's own step does not?

Whole steps of the real trainers inside a pass, from the next batch to the work after the optimizer. In the code of this
package (the next batch, forward to backward with recording of the losses, and the exchange after the step) every host
sync is an error: ``torch.cuda.set_sync_debug_mode("error")``. Elsewhere in the step each one is noted with the line
that called it, and must occur in torchtitan's own trainer, too. Two exchanges begin and are applied.

That mode does not detect waits inside torch.distributed and for events. The synchronising calls of the CUDA runtime,
which the profiler counts, include them. The printed table shows them with those of stock; they are not tested, because
torchtitan copies two more tensors of a batch to the device (example ids and weights), each with its own wait.

tests/distributed/titan/test_hot_path.py is the test on CPU.
"""

import argparse
import gc
import traceback
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch
from devices import DEVICE, IS_GPU, num_ranks
from host_syncs import PROFILED, STEPS, WARMUP, observe, site, violations
from one_gpu import meshes_of_one
from torch.distributed.device_mesh import DeviceMesh

from benchmarks.common import measure
from benchmarks.speed import step_time
from benchmarks.speed.step_time import RATIO_1, TEACHING
from titan_attent.data.text.shards import TokenShards
from titan_attent.scores.stored import Scoring
from titan_attent.scores.writer import ScoresWriter

pytestmark = pytest.mark.gpu

STOCK = "torchtitan's own trainer"
SOFT = ["--teacher.strategy", "soft", *TEACHING]
VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "uniform": ["--teacher.strategy", "uniform"],
    "random": ["--teacher.strategy", "random", *TEACHING],
    "hard": ["--teacher.strategy", "hard", *TEACHING],
    "soft": SOFT,
    "threshold": ["--teacher.strategy", "threshold", *TEACHING],
    "soft, equal weights": [*SOFT, "--teacher.weighting", "none"],
    "soft, functional gradient": [*SOFT, "--teacher.importance", "functional_gradient"],
    "soft, excess loss": [*SOFT, "--teacher.importance", "excess_loss", "--teacher.scores", "{scores}"],
    "soft, learnability": [*SOFT, "--teacher.importance", "learnability"],
    "soft, attainment": [*SOFT, "--teacher.importance", "attainment"],
    "soft, loss in chunks": [*SOFT, "--teacher.loss_chunks", "4"],
    "soft, pools": [*SOFT, *RATIO_1, "--teacher.pool_size", "{pool}"],
    "soft, dry run": [*SOFT, "--teacher.dry_run"],
    "reweighting": ["--teacher.strategy", "random", "--teacher.weighting", "loss", *RATIO_1, *TEACHING],
    "soft, two microbatches": [*SOFT, "--training.global_batch_size", "{two_microbatches}"],
    "soft, compiled": [*SOFT, "--compile.enable"],
}
REHEARSED = ("defaults", "soft, functional gradient", "reweighting")
"""The variants on a CPU; a rehearsal does not need all."""


def first_lines(error: BaseException) -> str:
    """The error and its location, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = site([(frame.filename, frame.lineno or 0, frame.line or "") for frame in frames])
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} at {where}"


def work(mesh: DeviceMesh, args: argparse.Namespace, data: str, dump: str, values: dict[str, str]) -> Any:
    """One rank: a row of numbers for torchtitan's own trainer, then for each variant against it.

    ``result`` describes the violations, and is empty without any.
    """
    step_time.prepare(mesh, args.flavor)
    microbatch = {"{two_microbatches}": 2}
    rows = []
    stock: dict[str, Any] = {}
    for name in [None, *args.variants]:
        gc.collect()
        torch.compiler.reset()
        settings = None if name is None else [values.get(setting, setting) for setting in VARIANTS[name]]
        count = 1 if name is None else max(microbatch.get(setting, 1) for setting in ["", *VARIANTS[name]])
        row: dict[str, Any] = {"configuration": STOCK if name is None else name}
        rows.append(row)
        runner = None
        try:
            with meshes_of_one(mesh.size()):
                runner = step_time.build(args, data, dump, settings)
                seen = observe(runner, args.device, teaching=name is not None)
            if name is None:
                stock = seen
            found = violations(seen["sites"], stock["sites"], microbatches=count)
            if name is not None and runner.trainer.job_config.teacher.strategy != "uniform" and seen["exchanges"] < 3:
                found.append(f"{seen['exchanges']} exchanges, but 3 were expected")
            row |= {
                "result": "; ".join(found),
                "steps": STEPS,
                "exchanges": seen["exchanges"],
                "noted per step": seen["sites"].total() / STEPS,
                "runtime calls per step": seen["calls"].total() / PROFILED,
                "sites": dict(seen["sites"]),
                "calls": dict(seen["calls"]),
            }
        except Exception as error:
            row |= {"result": first_lines(error)}
            if name is None:
                raise
        finally:
            if runner is not None:
                runner.trainer.close()
    return rows


def write_reference(folder: Path, *, data: str, seq_len: int) -> None:
    """Write random reference losses for every example, for the importance that reads them."""
    shards = TokenShards(data)
    num_examples = (shards.num_tokens - 1) // seq_len
    scoring = Scoring(
        **{"data_fingerprint": shards.fingerprint, "seq_len": seq_len, "num_examples": num_examples},
        **{"model": "synthetic", "precision": "float32", "checkpoint": "none", "checkpoint_sha256": "none"},
    )
    with ScoresWriter(folder, scoring=scoring) as writer:
        writer.append(torch.rand(num_examples, generator=torch.Generator().manual_seed(0)) * 5)
        writer.finish()


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Configuration -> its row, for the requested variants. Prints the table."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    args = argparse.Namespace(
        device=DEVICE,
        flavor="debugmodel",
        batch=4,  # sequences per process and step
        seq_len=512 if IS_GPU else 32,
        compile=False,  # a separate variant
        variants=[item.callspec.params["variant"] for item in items],
    )
    folder, processes = tmp_path_factory.mktemp("host_syncs"), num_ranks(at_most=2)
    batch = args.batch * processes
    # A pass over half of the data is longer than all steps, even with two microbatches per step.
    steps = 4 * (WARMUP + STEPS + PROFILED + 1)
    data = str(step_time.write_data(folder, num_tokens=(steps * batch + 1) * args.seq_len))
    write_reference(folder / "reference", data=data, seq_len=args.seq_len)
    values = {
        "{scores}": str(folder / "reference"),
        "{pool}": str(batch * steps // 2),
        "{two_microbatches}": str(2 * batch),
    }
    found = measure.run_ranks(work, args, data, str(folder), values, num_ranks=processes, device=DEVICE)
    columns = [key for key in found[0] if key not in ("sites", "calls")]
    print("\n" + measure.table([{key: row.get(key, "") for key in columns} for row in found]))
    print("\ntorchtitan's own host syncs, in all steps:")
    for where, count in found[0]["sites"].items():
        print(f"  {count:>5}  {where}")
    return {row["configuration"]: row for row in found}


@pytest.mark.parametrize("variant", VARIANTS if IS_GPU else REHEARSED)
def test_no_host_sync_beyond_those_of_torchtitans_own_step(variant: str, rows: dict[str, dict[str, Any]]) -> None:
    assert not rows[variant]["result"], rows[variant]["result"]
