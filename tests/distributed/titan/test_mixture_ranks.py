"""``[data.sources]`` and ``[data.validation_sets]`` in the trainer: the same steps on 2 ranks and on 1, resumed on the
other number, with changed proportions, with documents and with a teacher."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed.parallel_world import SAVED, STEPS, Settings, train_cells, write_data
from distributed.spawn import run_on_ranks

from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset

MIXED: Settings = {"data.sources": {"code": {"proportion": 0.75}, "other": {"proportion": 0.25}}}
TURNED: Settings = {
    "data.sources": {
        "code": {"proportion": [[SAVED, 0.75], [SAVED + 1, 0.25]]},
        "other": {"proportion": [[SAVED, 0.25], [SAVED + 1, 0.75]]},
    }
}
UNIFORM: Settings = {"teacher.strategy": "uniform"}
DOCUMENTS: Settings = {"data.unit": "document", "validation.enable": True, "data.validation_path": ""}
SAVES: Settings = {"checkpoint.enable": True}
CELLS: dict[str, Settings] = {
    "windows": MIXED | UNIFORM | SAVES,
    "documents": MIXED | UNIFORM | DOCUMENTS | SAVES,
    "teacher": MIXED | SAVES,
}
RESUMED: dict[str, Settings] = {
    f"{name}, resumed": CELLS[name] | TURNED | {"folder": name} for name in ("windows", "documents", "teacher")
}


def cells_of(size: int, cells: dict[str, Settings], data: str) -> dict[str, Settings]:
    local = {"training.local_batch_size": 8 // size, "validation.local_batch_size": 8 // size}
    sets = {"one": {"path": data}, "two": {"path": data, "weight": 3.0}}
    with_sets = {"data.validation_sets": sets}
    return {name: cell | local | (with_sets if "validation.enable" in cell else {}) for name, cell in cells.items()}


@pytest.fixture(scope="module")
def ranks(token_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("mixture")
    data = str(write_data(folder, str(token_data["train"] / "tokenizer.tiktoken")))
    two = run_on_ranks(train_cells, 2, cells_of(2, CELLS, data), data, str(folder), timeout=300.0)
    cells = cells_of(1, CELLS | RESUMED, data)
    cells = {name: cell | ({} if "folder" in cell else {"folder": f"alone {name}"}) for name, cell in cells.items()}
    one = run_on_ranks(train_cells, 1, cells, data, str(folder), timeout=300.0, apart=True)
    return {1: one, 2: two, "data": data}


def ids_of(ranks: list[Any], name: str) -> dict[int, np.ndarray]:
    """Step -> the examples of all ranks, int64 [8] or [8, M]."""
    return {
        step: np.concatenate([rank[name]["steps"][step]["ids"] for rank in ranks]) for step in ranks[0][name]["steps"]
    }


def sources_of(dataset: Any, ids: np.ndarray) -> np.ndarray:
    """The name of the source of each row."""
    names, firsts = zip(*dataset.sources, strict=True)
    first_examples = ids if ids.ndim == 1 else ids[:, 0]
    return np.array(names)[np.searchsorted(firsts, first_examples, side="right") - 1]


@pytest.mark.parametrize("name", CELLS)
def test_two_ranks_train_what_one_does_in_the_proportions(ranks: dict[Any, Any], name: str) -> None:
    one, two = ids_of(ranks[1], name), ids_of(ranks[2], name)
    dataset = (DocumentDataset if name == "documents" else TokenDataset)(ranks["data"], seq_len=32)
    for step in range(1, STEPS + 1):
        assert np.array_equal(one[step], two[step])
        num_code = int((sources_of(dataset, one[step]) == "code").sum())
        assert num_code == 6 if name != "documents" else abs(num_code - 6) <= 1
        losses = [
            run[0][name]["steps"][step]["metrics"]["loss_metrics/global_avg_loss"] for run in (ranks[1], ranks[2])
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    metrics = two and ranks[2][0][name]["steps"][STEPS]["metrics"]
    assert metrics["mixture/proportion/code"] == 0.75 and abs(metrics["mixture/share/other"] - 0.25) < 0.05
    assert metrics["mixture/epochs/other"] > 0 and 0 <= metrics["mixture/left/code"] < 1


@pytest.mark.parametrize("name", CELLS)
def test_a_run_resumes_on_another_number_of_ranks_with_other_proportions(ranks: dict[Any, Any], name: str) -> None:
    """The last step alone: its proportions are turned round, and no example of the pass before comes again."""
    dataset = (DocumentDataset if name == "documents" else TokenDataset)(ranks["data"], seq_len=32)
    resumed, whole = ids_of(ranks[1], f"{name}, resumed"), ids_of(ranks[2], name)
    assert list(resumed) == [SAVED + 1]
    num_code = int((sources_of(dataset, resumed[SAVED + 1]) == "code").sum())
    assert num_code == 2 if name != "documents" else abs(num_code - 2) <= 1
    if name == "windows":
        code = resumed[SAVED + 1][sources_of(dataset, resumed[SAVED + 1]) == "code"]
        assert set(code) <= set(whole[SAVED + 1]), "the source goes on where it was"
    metrics = ranks[1][0][f"{name}, resumed"]["steps"][SAVED + 1]["metrics"]
    assert metrics["mixture/proportion/code"] == 0.25


def test_validation_sets_are_the_same_on_any_number_of_ranks(ranks: dict[Any, Any]) -> None:
    found = [run[0]["documents"]["validation"] for run in (ranks[1], ranks[2])]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
