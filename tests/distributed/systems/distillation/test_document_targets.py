"""Targets on disk of documents: written on any ranks as a plain loop draws them, and learned from as from the source.

Two worlds, of one rank and of two, write with their own layouts: in short rows, or packed with a mask. The world of
one resumes what the other left unfinished. Then the world of two trains.
"""

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.parallel_world import FLAVORS, STEPS, Observed, Settings, config_of, plain_model, spec_of, train_cells
from distributed.spawn import run_on_ranks
from torch import Tensor
from torchtitan.models.llama3 import llama3_args

from titan_attent.data.plan import forward_rows
from titan_attent.data.text.document_examples import DocumentDataset, WholeDocuments
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.losses.target_draws import draw_targets
from titan_attent.scores.targets import DATA_FILE, FACTS_FILE, StoredTargets, TargetsWriter
from titan_attent.systems.distillation.checks import check_targets
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.titan.checks import preflight
from titan_attent.titan.scoring import write_documents
from titan_attent.titan.scoring.checkpoint_checks import scoring_config
from titan_attent.titan.scoring.targets import Options, TargetsCommand

SEQ_LEN, NUM = 32, 4
DOCUMENTS: Settings = {"data.unit": "document", "training.seq_len": SEQ_LEN}
MASKED: Settings = DOCUMENTS | {"data.document_mask": True, "model.flavor": "flex"}
TAGS = ("loss_metrics/global_avg_loss", "grad_norm", "distillation/divergence")
KINDS = {
    "argmax": Options(output="", kind="argmax", num=1, temperature=0.0, seed=0),
    "draws": Options(output="", kind="draws", num=NUM, temperature=1.0, seed=3),
}


def write_targets(settings: Settings, place: dict[str, str], *, kind: str, output: str, until: int = 9999) -> None:
    """The command of one process group; it dies when ``until`` examples are durable."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    config = scoring_config(config_of(settings, data=place["data"], folder=place["folder"]))
    config.checkpoint.initial_load_path = place["source"]
    spec = spec_of(config.model.name)
    preflight.check_run(config, spec, world_size=dist.get_world_size(), trains=False)
    durable = TargetsWriter.durable

    def dying(self: TargetsWriter, stop: int, *, num_records: int) -> None:
        durable(self, stop, num_records=num_records)
        if stop >= until:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_rows, "BLOCK_TOKENS", 2**12)  # blocks of 8 examples
        patch.setattr(write_documents, "CHUNK_BATCHES", 2)
        patch.setattr(TargetsWriter, "durable", dying)
        options = Options(**(vars(KINDS[kind]) | {"output": output}))
        num_ids: int = vars(spec.model_args[config.model.flavor])["vocab_size"]
        command = TargetsCommand(config, options, num_ids=num_ids)
        try:
            command.train()
        except SystemExit:  # of a mistake: what the command does with any error of a writer
            assert until < 9999
        finally:
            command.close()


class KeepTargets(Observed):
    """Keeps the targets that the loader gave."""

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        input_dict = kwargs["input_dict"]
        if "target_ids" in input_dict:
            SEEN.append([input_dict["input"].clone(), kwargs["labels"].clone(), input_dict["target_ids"].clone()])
        return super().forward_backward_step(**kwargs)


SEEN: list[list[Tensor]] = []


def of_two(mesh: Any, place: dict[str, str], cells: dict[str, Settings]) -> dict[str, Any]:
    folder = place["folder"]
    rows: Settings = DOCUMENTS | {"validation.local_batch_size": 2}
    write_targets(rows, place, kind="argmax", output=f"{folder}/argmax")
    write_targets(rows, place, kind="draws", output=f"{folder}/draws")
    write_targets(rows, place, kind="draws", output=f"{folder}/killed", until=16)
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distributed.parallel_world.Observed", KeepTargets)
        patch.setitem(llama3_args, "flex", copy.deepcopy(FLAVORS["llama3"]["flex"]))  # the live source's
        for name, settings in cells.items():
            SEEN.clear()
            results |= train_cells(mesh, {name: settings}, place["data"], f"{folder}/runs")
            results[name]["targets"] = [[tensor.numpy() for tensor in seen] for seen in SEEN]
    return results


def of_one(mesh: Any, place: dict[str, str]) -> None:
    rows: Settings = DOCUMENTS | {"validation.local_batch_size": 3}
    write_targets(rows, place, kind="draws", output=f"{place['folder']}/killed")
    write_targets(MASKED | {"validation.local_batch_size": 1}, place, kind="draws", output=f"{place['folder']}/packed")


def cell(settings: Settings, place: dict[str, str], *, stored: bool, **more: Any) -> Settings:
    size = more.pop("size", 4)
    distilling: Settings = {
        "training.local_batch_size": size,
        "teacher.importance": "loss",
        "distillation.schedule": "final",
        "distillation.temperature": 0.0,
        "distillation.label_weight": 0.25,
        "distillation.source": str(Path(place["source"]).parent),
        "distillation.targets": f"{place['folder']}/argmax" if stored else "",
    }
    return settings | distilling | {name.replace("__", "."): value for name, value in more.items()}


@pytest.fixture(scope="module")
def place(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Twenty documents of 0 to 150 letters in several shards, two steps of windows, and a source."""
    folder = tmp_path_factory.mktemp("document targets")
    text, rng = Path(json.__file__).parent.joinpath("scanner.py").read_text(), np.random.default_rng(0)
    with open(folder / "text.jsonl", "w") as file:
        for _ in range(20):
            first, size = int(rng.integers(0, 2000)), int(rng.integers(0, 150))
            file.write(json.dumps({"text": text[first : first + size]}) + "\n")
    tokenizer = str(token_data["train"] / "tokenizer.tiktoken")
    write_dataset([folder / "text.jsonl"], output=folder / "data", tokenizer=tokenizer, shard_tokens=250)
    source = folder / "source" / "step-10"
    dcp.save(source_model().state_dict(), checkpoint_id=source, no_dist=True)
    return {"folder": str(folder), "data": str(folder / "data"), "source": str(source)}


def source_model() -> torch.nn.Module:
    return plain_model({"model.flavor": "cell"}).requires_grad_(False)


@pytest.fixture(scope="module")
def runs(place: dict[str, str]) -> list[dict[str, Any]]:
    """Of each rank of the world of two, the results of the cells."""
    split = {f"parallelism__{name}_parallel_degree": 2 for name in ("tensor", "pipeline", "context")}
    cells = {
        "live": cell(MASKED, place, stored=False),
        "stored": cell(MASKED, place, stored=True),
        "cut": cell(DOCUMENTS, place, stored=True, data__packing="concatenate", teacher__strategy="uniform"),
        "FSDP": cell(DOCUMENTS, place, stored=True, size=2),
        **{
            f"{key.split('__')[1].split('_')[0]}": cell(DOCUMENTS, place, stored=True, size=8, **{key: value})
            for key, value in split.items()
        },
    }
    results = run_on_ranks(of_two, 2, place, cells, timeout=400.0)
    run_on_ranks(of_one, 1, place, apart=True, timeout=200.0)
    return results


@pytest.fixture(scope="module")
def expected(place: dict[str, str]) -> dict[str, Tensor]:
    """Kind -> the targets of every pair, int32 [pairs, N]: document after document, span after span, one at a time."""
    whole, model, pair = WholeDocuments(place["data"]), source_model(), 0
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for number in range(len(whole)):
        inputs = whole.read(torch.tensor([number]))[0]["input"]
        inputs = inputs[:, : int((whole.read(torch.tensor([number]))[1] >= 0).sum())]
        for first in range(0, inputs.shape[1], SEQ_LEN):
            logits = model(inputs[:, first : first + SEQ_LEN])[0]
            found["argmax"].append(logits.argmax(dim=-1, keepdim=True).int())
            tokens = torch.arange(pair, pair + len(logits))
            found["draws"].append(draw_targets(logits, tokens, num=NUM, temperature=1.0, seed=3))
            pair += len(logits)
    return {kind: torch.cat(parts) for kind, parts in found.items()}


@pytest.mark.parametrize(("folder", "kind"), [("argmax", "argmax"), ("draws", "draws"), ("packed", "draws")])
def test_the_files_are_those_of_a_plain_loop(
    folder: str, kind: str, runs: Any, expected: dict[str, Tensor], place: dict[str, str]
) -> None:
    """On two ranks in short rows, and on one packed with a mask, where another attention rounds otherwise."""
    content = np.fromfile(Path(place["folder"]) / folder / "step-10" / DATA_FILE, "<i4")
    differing = content.reshape(-1, KINDS[kind].num) != expected[kind].numpy()
    assert differing.sum() <= (3 if folder == "packed" else 0)
    assert len(expected[kind]) == DocumentDataset(place["data"], seq_len=SEQ_LEN).num_pairs


def test_resumed_on_another_number_of_ranks_the_files_are_the_same(runs: Any, place: dict[str, str]) -> None:
    whole, killed = (Path(place["folder"]) / name / "step-10" for name in ("draws", "killed"))
    for name in (DATA_FILE, FACTS_FILE):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_targets_of_other_spans_windows_or_ids_are_refused(runs: Any, place: dict[str, str]) -> None:
    config = DistillationConfig(schedule="final", targets=f"{place['folder']}/argmax", temperature=0.0)
    num_ids = StoredTargets(f"{place['folder']}/argmax/step-10").facts.num_ids
    assert num_ids > 0
    check = partial(check_targets, config, checkpoints=[10], num_ids=num_ids)
    check(DocumentDataset(place["data"], seq_len=SEQ_LEN))
    with pytest.raises(ValueError, match="seq_len is 16 in this run and 32 in the folder; num_examples is"):
        check(DocumentDataset(place["data"], seq_len=16))
    with pytest.raises(ValueError, match="unit is 'window' in this run and 'document' in the folder"):
        check(TokenDataset(place["data"], seq_len=SEQ_LEN))
    with pytest.raises(ValueError, match=f"has {num_ids:,} token ids, and the run's model has {num_ids - 1:,}"):
        check(DocumentDataset(place["data"], seq_len=SEQ_LEN), num_ids=num_ids - 1)


def test_a_run_with_targets_is_the_run_with_the_live_source(runs: list[dict[str, Any]]) -> None:
    """Bit for bit: with a teacher that weights documents, packed and masked."""
    for rank in runs:
        assert (rank["stored"]["steps"][STEPS]["weights"] != 1).any()
        for step in range(1, STEPS + 1):
            live, stored = (rank[name]["steps"][step] for name in ("live", "stored"))
            assert np.array_equal(live["ids"], stored["ids"])
            for tag in TAGS:
                assert live["metrics"].get(tag) == stored["metrics"].get(tag), (step, tag)


@pytest.mark.parametrize("name", ["tensor", "pipeline", "context"])
def test_parallelism_changes_nothing(name: str, runs: list[dict[str, Any]]) -> None:
    for step in range(1, STEPS + 1):
        alone, split = (runs[0][cell]["steps"][step]["metrics"] for cell in ("FSDP", name))
        for tag in TAGS[: 2 if step == 1 else 3]:  # the divergence is that of the step before
            assert split[tag] == pytest.approx(alone[tag], rel=2e-4), (step, tag)


@pytest.mark.parametrize("name", ["stored", "cut"])
def test_every_label_of_a_batch_has_the_targets_of_its_token(
    name: str, runs: list[dict[str, Any]], expected: dict[str, Tensor], place: dict[str, str]
) -> None:
    """Also where a document is cut between two windows: the source read it whole."""
    dataset = DocumentDataset(place["data"], seq_len=SEQ_LEN)
    lengths = dataset.lengths(np.arange(len(dataset)))
    stops, inputs = np.cumsum(lengths), dataset.read(torch.arange(len(dataset)))[0]["input"]
    num_cut = 0
    for rank in runs:
        ids_RM = np.concatenate([step["ids"] for step in rank[name]["steps"].values()])
        columns = (np.concatenate(parts) for parts in zip(*rank[name]["targets"], strict=True))
        for ids, row, labels, targets in zip(ids_RM, *columns, strict=True):
            examples = [i for i in ids.tolist() if i < len(dataset)]
            of_examples = np.concatenate([inputs[i, : lengths[i]] for i in examples])
            targets_of_examples = np.concatenate(
                [expected["argmax"][stops[i] - lengths[i] : stops[i]] for i in examples]
            )
            num = int((labels >= 0).sum())
            skipped = [
                first
                for first in range(lengths[examples[0]])
                if of_examples[first : first + num].tolist() == row[:num].tolist()
            ]
            assert any((targets_of_examples[first : first + num] == targets[:num]).all() for first in skipped)
            assert (labels[:num] >= 0).all() and (targets[num:] == 0).all()
            num_cut += skipped[0] > 0
    assert num_cut > 5 if name == "cut" else num_cut == 0
