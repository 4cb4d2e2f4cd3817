"""Image models under every parallelism that they support, against a single process: same examples, pixels, losses,
gradients and decisions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from distributed.cells import Cells, chosen, merged, parameters
from distributed.spawn import run_on_ranks
from distributed.vision_world import STEPS, Settings, train_cells, train_plainly

from titan_attent.data.images import write_images

HSDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2}
DDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}
MAE: Settings = {"model.name": "mae_attent", "vision.mask_ratio": 0.5, "vision.label_smoothing": 0.0}
SCORED: Settings = {"teacher.scoring": "forward_once", "teacher.warmup_passes": 0}
ACCUMULATED: Settings = {"training.local_batch_size": 2}
UNIFORM: Settings = {"teacher.strategy": "uniform"}
MIXED: Settings = {"vision.mixup": 0.4, "vision.cutmix": 1.0}
COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager"}

CELLS: Cells = {
    2: {
        "FSDP": SCORED,
        "FSDP, compiled, selective AC": COMPILED | {"activation_checkpoint.mode": "selective"},
        "FSDP, uniform": UNIFORM,
        "FSDP, mixed, accumulated, uniform": MIXED | ACCUMULATED | UNIFORM,
        "DDP": DDP,
        "mae, FSDP": MAE | SCORED,
        "mae, FSDP, uniform": MAE | UNIFORM,
    },
    4: {
        "HSDP": HSDP | {"training.local_batch_size": 2},
    },
}
MORE: Cells = {
    2: {
        "FSDP, accumulated, full AC": ACCUMULATED | {"activation_checkpoint.mode": "full"},
        "FSDP, attainment": {"teacher.importance": "attainment", "teacher.strategy": "hard"},
        "FSDP, mixed": MIXED,
        "mae, FSDP, accumulated, full AC": MAE | ACCUMULATED | {"activation_checkpoint.mode": "full"},
        "mae, FSDP, compiled": MAE | COMPILED | {"compile.backend": "eager"},
    },
    4: {
        "mae, HSDP": MAE | HSDP | {"training.local_batch_size": 2},
    },
}
ALL = merged(CELLS, MORE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 27)
    images = rng.integers(0, 256, (27, 8, 8, 3)) // 2 + labels[:, None, None, None] * 20
    np.savez(folder / "images.npz", images=images.astype(np.uint8), labels=labels)
    write_images([folder / "images.npz"], output=folder / "shards")
    return str(folder / "shards")


Worlds = dict[int, list[dict[str, Any]]]
"""Number of ranks -> the cells' results on each rank."""


@pytest.fixture(scope="module")
def worlds(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    folder = str(tmp_path_factory.mktemp("runs"))
    return {
        size: run_on_ranks(train_cells, size, cells, data, folder, timeout=400.0)
        for size, cells in chosen(request, CELLS, MORE).items()
    }


def test_teaching_waits_for_nothing(worlds: Worlds) -> None:
    """From the first forward to the optimizer, and after the step: no more than the stock step of the same model."""
    for rank in worlds[2]:
        for name, settings in CELLS[2].items():
            stock = "mae, FSDP, uniform" if name.startswith("mae") else "FSDP, uniform"
            if (
                "FSDP" in name
                and stock in rank
                and not settings.keys() & {"compile.enable", "training.local_batch_size"}
            ):
                assert rank[name]["syncs"] == rank[stock]["syncs"], name


@pytest.fixture(scope="module")
def plain(data: str) -> Callable[[Settings], dict[str, Any]]:
    """The plain process of a cell, once for all cells that differ only in where and how they compute."""
    found: dict[str, dict[str, Any]] = {}

    def of(settings: Settings) -> dict[str, Any]:
        own = {key: value for key, value in settings.items() if key.startswith(("teacher.", "model.", "vision."))}
        key = repr(sorted(own.items()))
        if key not in found:
            found[key] = train_plainly(own, data=data)
        return found[key]

    return of


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_a_cell_is_what_a_plain_process_trains(
    worlds: Worlds, plain: Callable[[Settings], dict[str, Any]], size: int, name: str
) -> None:
    settings, ranks = ALL[size][name], worlds[size]
    expected_run = plain(settings)
    results = sorted((rank[name] for rank in ranks), key=lambda result: result["place"])
    where = f"cell {name}"
    for step in range(1, STEPS + 1):
        expected, here = expected_run["steps"][step], [result["steps"][step] for result in results]
        ids = np.concatenate([one["ids"] for one in here])
        np.testing.assert_array_equal(ids, expected["ids"], err_msg=f"{where}, step {step}")
        weights = np.concatenate([one["weights"] for one in here])
        np.testing.assert_allclose(weights, expected["weights"], rtol=2e-4, err_msg=f"{where}, step {step}")
        for one in here:
            metrics = one["metrics"]
            np.testing.assert_allclose(metrics["loss_metrics/global_avg_loss"], expected["losses"].mean(), rtol=1e-4)
            np.testing.assert_allclose(metrics["grad_norm"], expected["norm"], rtol=1e-3, err_msg=where)
            assert metrics["throughput(ips)"] > 0
            for parameter, gradient in expected["gradients"].items():
                np.testing.assert_allclose(
                    one["gradients"][parameter], gradient, rtol=1e-3, atol=2e-5, err_msg=f"{where}: {parameter}"
                )
    for result in results:
        if settings.get("teacher.strategy") != "uniform":
            for key, here in result["buffer"].items():
                expected = expected_run["buffer"][key]
                np.testing.assert_allclose(here, expected, rtol=1e-3, err_msg=f"{where}: {key}")
    for result in results:
        for key, expected in expected_run["validation"].items():
            found = result["validation"][f"validation_metrics/{key}"]
            np.testing.assert_allclose(found, expected, rtol=1e-3, err_msg=f"{where}: {key}")
