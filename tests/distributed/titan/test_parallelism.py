"""Every parallelism of torchtitan against a single process: same examples, weights, losses, gradients and decisions.

A cell runs the trainer for a few steps in a world of 2 or 4 processes; the reference is ``train_plainly``. Each world
is started once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.cells import Cells, Worlds, chosen, merged, parameters
from distributed.parallel_world import STEPS, Settings, by_source, train_cells, train_plainly, write_data


def degrees(**degrees: int) -> Settings:
    return {f"parallelism.{name}_degree": degree for name, degree in degrees.items()}


def batch(size: int) -> Settings:
    return {"training.local_batch_size": size, "validation.local_batch_size": size}


def schedule(name: str) -> Settings:
    return {"parallelism.pipeline_parallel_schedule": name}


def model(name: str, flavor: str = "cell") -> Settings:
    return {"model.name": f"{name}_attent", "model.flavor": flavor}


def of_two_layers(settings: Settings) -> Settings:
    """Use a flavor of two layers where one or two stages suffice; four stages, or two layers per stage, need four."""
    if settings.get("parallelism.pipeline_parallel_schedule") in FOUR_STAGES or settings == TWO_PER_STAGE:
        return settings
    return settings | {"model.flavor": settings.get("model.flavor", "cell") + " of 2"}


FOUR_STAGES = ("Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
UNIFORM: Settings = {"teacher.strategy": "uniform"}
WORST_CASE: Settings = {"teacher.strategy": "uniform", "teacher.weighting": "worst_case", "teacher.q": 9.0}
SCORED: Settings = {"teacher.scoring": "forward_once", "teacher.warmup_passes": 0}
VALIDATED: Settings = {"validation.enable": True}
DDP = degrees(data_parallel_replicate=2, data_parallel_shard=1)
TP, PP, CP, EP = (degrees(**{f"{name}_parallel": 2}) for name in ("tensor", "pipeline", "context", "expert"))
NO_LOSS_PARALLEL: Settings = {"parallelism.disable_loss_parallel": True}
CHUNKED: Settings = {"teacher.loss_chunks": 3}
FULL_AC: Settings = {"activation_checkpoint.mode": "full"}
COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager"}
SELECTIVE_AC: Settings = {"activation_checkpoint.mode": "selective"}

TWO_PER_STAGE = batch(4) | PP | SCORED | VALIDATED

CELLS: Cells = {
    2: {
        "FSDP": batch(4) | SCORED | VALIDATED,
        "FSDP, full AC, loss in chunks": batch(4) | FULL_AC | CHUNKED,
        "DDP, accumulated": batch(2) | DDP,
        "TP": batch(8) | TP | SCORED | VALIDATED,
        "TP, accumulated, whole logits in chunks": batch(4) | TP | NO_LOSS_PARALLEL | CHUNKED | VALIDATED,
        "PP 1F1B, accumulated": TWO_PER_STAGE,
        "PP Interleaved1F1B": batch(8) | PP | schedule("Interleaved1F1B") | VALIDATED,
        "PP GPipe, microbatches of 2, loss in chunks": batch(8)
        | CHUNKED
        | PP
        | schedule("GPipe")
        | {"parallelism.pipeline_parallel_microbatch_size": 2},
        "CP": batch(8) | CP | SCORED | VALIDATED,
        "CP, accumulated, not balanced, loss in chunks": batch(4)
        | CP
        | CHUNKED
        | {"parallelism.context_parallel_load_balancer": None},
        "CP, uniform": batch(8) | CP | UNIFORM,
        "llama4, EP": batch(4) | model("llama4") | EP,
        "deepseek_v3, TP": batch(8) | model("deepseek_v3") | TP,
        "hyla, FSDP, selective AC": batch(4) | model("hyla") | SELECTIVE_AC | SCORED | VALIDATED,
        "hyla with a softmax and a norm, PP": batch(8)
        | model("hyla")
        | PP
        | {"hyla.normalization": "softmax", "hyla.output_norm": True},
        "hyla reference, CP, not balanced": batch(8)
        | model("hyla", "reference")
        | CP
        | {"parallelism.context_parallel_load_balancer": None},
        "gpt_oss, FSDP": batch(4) | model("gpt_oss"),
        "qwen3 tied, TP": batch(8) | model("qwen3", "tied") | TP,
        "qwen3 experts, FSDP": batch(4) | model("qwen3", "moe"),
    },
    4: {
        "HSDP, selective AC": batch(2) | SELECTIVE_AC | degrees(data_parallel_replicate=2, data_parallel_shard=2),
        "HSDP, the worst case": batch(2) | WORST_CASE | degrees(data_parallel_replicate=2, data_parallel_shard=2),
        "FSDP + PP": batch(4) | PP | {"checkpoint.enable": True},
        "FSDP + TP, resumed from FSDP + PP": batch(4) | TP | {"checkpoint.enable": True, "folder": "FSDP + PP"},
        "TP + CP, selective AC": batch(8) | TP | CP | SELECTIVE_AC | SCORED | VALIDATED,
        "llama4, HSDP + EP": batch(2)
        | model("llama4")
        | EP
        | degrees(data_parallel_replicate=2, data_parallel_shard=2),
    },
}
MORE: Cells = {
    2: {
        "FSDP, accumulated, selective AC": batch(2) | SELECTIVE_AC,
        "DDP, uniform": batch(4) | DDP | UNIFORM,
        "TP, uniform": batch(8) | TP | UNIFORM,
        "PP ZBVZeroBubble": batch(8) | PP | schedule("ZBVZeroBubble"),
        "PP DualPipeV": batch(8)
        | PP
        | schedule("DualPipeV")
        | {"parallelism.pipeline_parallel_expert_parallel_overlap": False},
        "PP, uniform": batch(8) | PP | UNIFORM,
        "llama4, FSDP": batch(4) | model("llama4") | SCORED | VALIDATED,
        "EP without experts": batch(4) | EP,
        "llama4, TP": batch(8) | model("llama4") | TP,
        "llama4, PP": batch(8) | model("llama4") | PP | SCORED,
        "llama4, CP": batch(8) | model("llama4") | CP,
        "deepseek_v3, EP": batch(4) | model("deepseek_v3") | EP,
        "deepseek_v3, PP": batch(8) | model("deepseek_v3") | PP,
        "deepseek_v3, CP": batch(8) | model("deepseek_v3") | CP,
        "hyla, CP, compiled": batch(8) | model("hyla") | CP | VALIDATED | COMPILED,
        "gpt_oss, EP": batch(4) | model("gpt_oss") | EP,
        "qwen3, TP": batch(8) | model("qwen3") | TP,
        "qwen3, CP": batch(8) | model("qwen3") | CP,
        "qwen3 tied, FSDP": batch(4) | model("qwen3", "tied"),
        "qwen3 experts, EP": batch(4) | model("qwen3", "moe") | EP,
    },
    4: {
        "HSDP + CP": batch(4) | CP | VALIDATED | degrees(data_parallel_replicate=2, data_parallel_shard=1),
        "TP + PP, full AC": batch(8) | TP | PP | FULL_AC | SCORED | VALIDATED,
        "PP + CP, full AC": batch(8) | PP | CP | FULL_AC | SCORED | VALIDATED,
        "hyla, HSDP + CP, full AC": batch(4)
        | model("hyla")
        | CP
        | FULL_AC
        | degrees(data_parallel_replicate=2, data_parallel_shard=1),
        "deepseek_v3, FSDP + TP + EP + ETP": batch(4)
        | model("deepseek_v3")
        | TP
        | EP
        | degrees(expert_tensor_parallel=2),
        "qwen3 experts, FSDP + TP": batch(4) | model("qwen3", "moe") | TP,
        "llama4, FSDP + PP + EP": batch(4) | model("llama4") | PP | EP,
    },
}
CELLS, MORE = (
    {size: {name: of_two_layers(settings) for name, settings in named.items()} for size, named in cells.items()}
    for cells in (CELLS, MORE)
)
ALL = merged(CELLS, MORE)


def result_settings(settings: Settings) -> Settings:
    """The settings of a cell that affect its result; the others only affect where it is computed."""
    return {
        key: value
        for key, value in settings.items()
        if key.startswith(("teacher.", "model.", "hyla.")) and key not in CHUNKED
    }


class Measured(Worlds):
    """With the references, each computed at its first use."""

    def __init__(self, folder: Path, tokenizer: Path, cells: Cells):
        super().__init__(train_cells, cells, data=write_data(folder, str(tokenizer)), folder=folder)
        self.references: dict[str, dict] = {}

    def reference(self, settings: Settings) -> dict[str, Any]:
        settings = result_settings(settings)
        key = repr(sorted(settings.items()))
        if key not in self.references:
            self.references[key] = train_plainly(settings, data=str(self.data))
        return self.references[key]


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    tokenizer = token_data["train"] / "tokenizer.tiktoken"
    return Measured(tmp_path_factory.mktemp("parallelism"), tokenizer, chosen(request, CELLS, MORE))


def largest_loss(losses: np.ndarray, *, dp: int, cp: int, balanced: bool) -> float:
    """The largest mean over the tokens of one rank, from the losses [G, L] of a batch."""
    chunks = np.split(losses, 2 * cp, axis=1)
    by_cp_rank = [
        np.concatenate((chunks[r], chunks[-1 - r]) if balanced else chunks[2 * r : 2 * r + 2], axis=1)
        for r in range(cp)
    ]
    return max(rows.mean() for of_rank in by_cp_rank for rows in np.split(of_rank, dp))


def check_cell(settings: Settings, ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Assert that the results of every rank of a cell are those of ``train_plainly``."""
    by_place = {rank["place"][0]: rank for rank in ranks}
    assert sorted(by_place) == list(range(ranks[0]["place"][1]))
    balanced = settings.get("parallelism.context_parallel_load_balancer", "headtail") is not None
    for rank in ranks:
        assert rank["steps"].keys() == ranks[0]["steps"].keys() and STEPS in rank["steps"]
        peer = by_place[rank["place"][0]]
        for step, seen in rank["steps"].items():
            # Peers along other dimensions get equal batches.
            assert np.array_equal(seen["ids"], peer["steps"][step]["ids"])
            assert np.array_equal(seen["weights"], peer["steps"][step]["weights"])
            reference_step, metrics = expected["steps"][step], seen["metrics"]
            assert metrics["grad_norm"] == pytest.approx(reference_step["norm"], rel=1e-4), step
            assert metrics["n_tokens_seen"] == step * reference_step["losses"].size
            # Of every rank, those of earlier pipeline stages included, which torchtitan gives -1 or -2.
            assert metrics["loss_metrics/global_avg_loss"] == pytest.approx(
                reference_step["losses"].mean(), rel=1e-5
            ), step
            if "teacher.weighting" in settings:
                assert metrics["teacher/worst_case_loss"] == pytest.approx(reference_step["trained"], rel=1e-5), step
            found = by_source(metrics, "loss_metrics")
            assert found == pytest.approx(reference_step["by source"], rel=1e-5)
            _, dp, cp = rank["place"]
            if settings["training.local_batch_size"] * dp == 8:  # not accumulated, whose ranks mix rows
                largest = largest_loss(reference_step["losses"], dp=dp, cp=cp, balanced=balanced)
                assert metrics["loss_metrics/global_max_loss"] == pytest.approx(largest, rel=1e-5), step
            for parameter, gradient in seen["gradients"].items():
                reference = reference_step["gradients"][parameter]
                error = np.abs(gradient - reference).max() / np.abs(reference).max()
                assert error < 1e-4, f"step {step}, {parameter}"
        assert rank["buffer"].keys() == expected["buffer"].keys()
        for key, value in expected["buffer"].items():
            np.testing.assert_allclose(rank["buffer"][key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        for key, value in rank["experts"].items():
            np.testing.assert_allclose(value, expected["experts"][key], atol=1e-7, err_msg=key)
        if "validation" in rank:
            assert rank["validation"] == pytest.approx(expected["validation"], rel=1e-5)
            assert rank["validation by source"] == pytest.approx(expected["validation by source"], rel=1e-5)
    for step in ranks[0]["steps"]:
        reference_step = expected["steps"][step]
        for key, exact in (("ids", True), ("weights", False)):
            whole = np.concatenate([by_place[place]["steps"][step][key] for place in sorted(by_place)])
            np.testing.assert_allclose(
                whole, reference_step[key], rtol=0 if exact else 1e-4, err_msg=f"step {step}, {key}"
            )
    names = set().union(*(rank["steps"][STEPS]["gradients"] for rank in ranks))
    assert names == expected["steps"][STEPS]["gradients"].keys()
    assert set().union(*(rank["experts"] for rank in ranks)) == expected["experts"].keys()


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_parallel_training_is_plain_training(measured: Measured, size: int, name: str) -> None:
    settings = ALL[size][name]
    check_cell(settings, measured.cell(size, name), measured.reference(settings))
