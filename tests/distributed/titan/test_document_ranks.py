"""``[data] document_mask`` in the trainer, under every parallelism that takes it: packed rows train as their examples
train alone.

Two ranks run the trainer on one batch of packed rows; the reference is the same model in one process, with one example
per row and no mask.
"""

import copy
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed.cells import Cells, Worlds, chosen, merged, parameters
from distributed.parallel_world import Settings, config_of, full, plain_model, plain_name, spec_of
from distributed.spawn import run_on_ranks
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torchtitan.train import Trainer

from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.systems.system import Batch, StepLoss
from titan_attent.titan.trainer import TeachingTrainer

ROWS, SEQ_LEN = 4, 32
LENGTHS = [[7, 1, 13, 8], [32], [20, 12], [3, 3, 3, 3, 3, 3, 3]]
"""Tokens of the examples of each row; the rest of a row is padding."""


def packed_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and example index, int64 [4, 32]."""
    tokens = torch.randint(512, (ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(seed))
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    index = torch.zeros_like(inputs)
    for row, lengths in enumerate(LENGTHS):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        index[row] = F.pad(numbers, (0, SEQ_LEN - len(numbers)), value=len(lengths) - 1)
        labels[row, len(numbers) :] = IGNORE_INDEX
    return inputs, labels, index


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX)


def causal_logits(model: Any, inputs: Tensor) -> Tensor:
    """Logits of whole rows: by sdpa, and gpt_oss, which has none, by its causal mask."""
    masks = {}
    if model.model_args.attn_type == "flex":
        masks["attention_masks"] = model.get_attention_masks(inputs, None, {})
    return model(inputs, **masks)


def reference(settings: Settings) -> dict[str, Any]:
    """Losses [4, 32] and gradients of the examples of the batch, each alone in a row; the logits of whole rows."""
    settings = {key: value for key, value in settings.items() if key.startswith("model.")}
    flex: Any = plain_model(BASE | settings)
    args = copy.deepcopy(flex.model_args)
    args.attn_type = "flex" if settings["model.name"] in ("gpt_oss_attent", "llama4_attent") else "sdpa"
    model = type(flex)(args)
    model.load_state_dict(flex.state_dict())
    with torch.no_grad():
        for name, buffer in flex.named_buffers():
            model.get_buffer(name).copy_(buffer)
    inputs, labels, _ = packed_batch()
    losses = torch.zeros(ROWS, SEQ_LEN)
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            span = slice(first, first + length)
            alone = token_losses(causal_logits(model, inputs[row : row + 1, span]), labels[row : row + 1, span])
            losses[row, span] = alone[0].detach()
            (alone.sum() / (labels != IGNORE_INDEX).sum()).backward()
            first += length
    gradients = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    with torch.no_grad():
        return {"losses": losses.numpy(), "gradients": gradients, "causal": causal_logits(model, inputs).numpy()}


# -- the ranks ---------------------------------------------------------------------------------------------------------


def environment() -> None:
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())


def trainer_of(settings: Settings, *, data: str, folder: str) -> TeachingTrainer:
    config = config_of(BASE | settings, data=data, folder=folder)
    spec_of(config.model.name)
    trainer = TeachingTrainer(config)
    weights = plain_model(BASE | settings).state_dict()
    for part in trainer.model_parts:
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(part, {name: tensor.clone() for name, tensor in weights.items()}, options=options)
    return trainer


def local_batch(trainer: TeachingTrainer, *, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """This rank's rows of the batch, with the columns that a loader gives."""
    inputs, labels, index = packed_batch(seed)
    rows = slice(*(np.arange(2) + trainer.loader.dp_rank) * (ROWS // trainer.loader.dp_world_size))
    ids = torch.arange(ROWS)[rows]
    return {"input": inputs[rows], "example_index": index[rows], "example_id": ids}, labels[rows]


def row_losses(pred: Tensor, batch: Batch) -> StepLoss:
    logits = pred.full_tensor() if isinstance(pred, DTensor) else pred
    losses = token_losses(logits, batch.labels)
    return StepLoss(losses.sum(), losses.sum().detach(), {"losses": losses.detach()})


def run_cell(settings: Settings, *, data: str, folder: str) -> dict[str, Any]:
    trainer = trainer_of(settings, data=data, folder=folder)
    stance: Callable[[], AbstractContextManager[Any]] = nullcontext
    try:
        valid = torch.tensor(float((packed_batch()[1] != IGNORE_INDEX).sum()))
        if trainer.job_config.compile.enable:  # another batch compiles, and none after it
            for seed in (1, 2):
                input_dict, labels = local_batch(trainer, seed=seed)
                trainer.forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=valid)
            trainer.optimizers.zero_grad()
            stance = lambda: torch.compiler.set_stance("fail_on_recompile")  # noqa: E731
        input_dict, labels = local_batch(trainer)
        with stance():
            trainer.forward_backward_step(input_dict=input_dict, labels=labels, global_valid_tokens=valid)
        result: dict[str, Any] = {
            "gradients": {
                plain_name(name).replace("_orig_mod.", ""): full(parameter.grad)
                for part in trainer.model_parts
                for name, parameter in part.named_parameters()
            },
            "rows": trainer.loader.dp_rank,
        }
        ((_, stats),) = trainer.forward([local_batch(trainer)], row_losses)
        result["losses"] = None if stats is None else full(stats["losses"])
        if not trainer.parallel_dims.pp_enabled:
            input_dict, labels = local_batch(trainer)
            with trainer.predict(input_dict["input"], labels) as (logits, _):
                result["causal"] = full(logits)
        logged: list[dict[str, float]] = []
        trainer.metrics_processor.logger.log = lambda metrics, step: logged.append(metrics)
        trainer.validator.validate(trainer.model_parts, 1)
        result["validation"] = logged[-1]["validation_metrics/loss"]
        return result
    finally:
        trainer.close()


def run_cells(mesh: Any, cells: dict[str, Settings], data: str, folder: str) -> dict[str, dict[str, Any]]:
    """Every cell in turn, in one process group."""
    environment()
    return {name: run_cell(settings, data=data, folder=f"{folder}/{name}") for name, settings in cells.items()}


BASE: Settings = {
    "model.flavor": "flex of 2",
    "data.document_mask": True,
    "teacher.strategy": "uniform",
    "training.local_batch_size": ROWS,
    "training.global_batch_size": ROWS,
    "validation.enable": True,
    "validation.local_batch_size": ROWS,
    "validation.steps": 1,
}
HALVES: Settings = {"training.local_batch_size": ROWS // 2, "validation.local_batch_size": ROWS // 2}
TP, PP, EP = ({f"parallelism.{name}_parallel_degree": 2} for name in ("tensor", "pipeline", "expert"))
DDP: Settings = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 1}
COMPILED: Settings = {"compile.enable": True, "compile.backend": "aot_eager", "compile.components": ["model"]}


def with_models(cells: dict[str, Settings]) -> Cells:
    named = {name: {"model.name": f"{name.partition(',')[0]}_attent"} | settings for name, settings in cells.items()}
    return {2: named}


CELLS = with_models(
    {
        "llama3, FSDP": HALVES,
        "llama3, FSDP, compiled": HALVES | COMPILED,
        "llama3, FSDP, full AC": HALVES | {"activation_checkpoint.mode": "full"},
        "llama3, TP": TP,
        "llama3, PP": PP,
        "llama4, FSDP": HALVES,
        "llama4, EP": HALVES | EP,
        "deepseek_v3, FSDP": HALVES,
        "qwen3, FSDP": HALVES,
        "gpt_oss, FSDP": HALVES,
    }
)
MORE = with_models(
    {
        "llama3, DDP": HALVES | DDP,
        "llama3, PP in microbatches of 2": PP | {"parallelism.pipeline_parallel_microbatch_size": 2},
        "llama4, TP": TP,
        "llama4, PP": PP,
        "deepseek_v3, TP": TP,
        "deepseek_v3, PP": PP,
        "deepseek_v3, EP": HALVES | EP,
        "qwen3, FSDP, compiled": HALVES | COMPILED,
        "qwen3, TP": TP,
        "gpt_oss, EP": HALVES | EP,
    }
)
ALL = merged(CELLS, MORE)


# -- against the reference ---------------------------------------------------------------------------------------------


class Measured(Worlds):
    """With the references, each computed at its first use."""

    def __init__(self, folder: Path, tokenizer: Path, cells: Cells):
        super().__init__(run_cells, cells, data=folder / "data", folder=folder)
        source = Path(json.__file__).parent / "scanner.py"
        write_dataset([source], output=self.data, tokenizer=str(tokenizer))
        self.references: dict[str, dict[str, Any]] = {}

    def reference(self, settings: Settings) -> dict[str, Any]:
        name = settings["model.name"]
        if name not in self.references:
            self.references[name] = reference(settings)
        return self.references[name]


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Measured:
    tokenizer = token_data["train"] / "tokenizer.tiktoken"
    return Measured(tmp_path_factory.mktemp("documents"), tokenizer, chosen(request, CELLS, MORE))


@pytest.mark.parametrize(("size", "name"), parameters(CELLS, MORE))
def test_packed_rows_train_as_their_examples_alone(measured: Measured, size: int, name: str) -> None:
    expected, ranks = measured.reference(ALL[size][name]), measured.cell(size, name)
    names = set().union(*(rank["gradients"] for rank in ranks))
    assert names == expected["gradients"].keys()
    num_ranks = 1 + max(rank["rows"] for rank in ranks)
    for rank in ranks:
        for parameter, gradient in rank["gradients"].items():
            exact = expected["gradients"][parameter]
            assert np.abs(gradient - exact).max() < 1e-4 * np.abs(exact).max(), parameter
        rows = np.split(np.arange(ROWS), num_ranks)[rank["rows"]]
        if rank["losses"] is not None:
            np.testing.assert_allclose(rank["losses"], expected["losses"][rows], rtol=1e-4, atol=1e-5)
        if "causal" in rank:
            np.testing.assert_allclose(rank["causal"], expected["causal"][rows], rtol=1e-4, atol=1e-4)
    assert any(rank["losses"] is not None for rank in ranks)
    assert ranks[0]["validation"] == pytest.approx(ranks[1]["validation"], rel=1e-6)


def test_the_examples_of_a_row_would_see_each_other_without_the_mask(measured: Measured) -> None:
    """The comparison above would notice: whole rows have other losses."""
    expected = measured.reference(CELLS[2]["llama3, FSDP"])
    inputs, labels, index = packed_batch()
    whole = token_losses(torch.from_numpy(expected["causal"]), labels).numpy()
    later = (index > 0).numpy() & (labels != IGNORE_INDEX).numpy()
    assert (np.abs(whole - expected["losses"])[later] > 1e-3).mean() > 0.9
    np.testing.assert_allclose(whole[~later], expected["losses"][~later], rtol=1e-4, atol=1e-5)


# -- with the key off --------------------------------------------------------------------------------------------------


def gradients_off(mesh: Any, flavor: str, data: str, folder: str) -> list[dict[str, np.ndarray]]:
    """The gradients of the trainer, and those of torchtitan's own functions, without the mask."""
    environment()
    settings = {"model.name": "llama3_attent", "model.flavor": flavor, "data.document_mask": False}
    trainer = trainer_of(settings, data=data, folder=folder)
    (model,) = trainer.model_parts
    results = []
    try:
        input_dict, labels = local_batch(trainer)
        input_dict = {name: input_dict[name] for name in ("input", "example_id")}
        valid = torch.tensor(100.0)
        trainer.forward_backward_step(input_dict=dict(input_dict), labels=labels, global_valid_tokens=valid)
        results.append({name: full(parameter.grad) for name, parameter in model.named_parameters()})
        trainer.optimizers.zero_grad()
        stock = Trainer.post_dataloading_process(trainer, {"input": input_dict["input"]}, labels)
        assert ("attention_masks" in stock[3]) == flavor.startswith("flex") and "positions" not in stock[3]
        with trainer.train_context():
            with trainer.maybe_enable_amp:
                loss = trainer.loss_fn(model(stock[0], **stock[2], **stock[3]), labels) / valid
            loss.backward()
        results.append({name: full(parameter.grad) for name, parameter in model.named_parameters()})
    finally:
        trainer.close()
    return results


@pytest.mark.parametrize("flavor", ["cell of 2", "flex of 2"])
def test_off_is_torchtitans_own_path_bit_for_bit(flavor: str, measured: Measured, tmp_path: Path) -> None:
    ((ours, stock),) = run_on_ranks(gradients_off, 1, flavor, str(measured.data), str(tmp_path / "run"), apart=True)
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        assert np.array_equal(ours[name], gradient), name
