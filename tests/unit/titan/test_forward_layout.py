"""forward_rows.py of titan: which layout a run gets, and what its lengths cost a compiled model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
import torch

from titan_attent.data.plan.forward_rows import ForwardRows
from titan_attent.data.text.document_examples import DocumentDataset
from titan_attent.data.text.shards import TokenDataset
from titan_attent.data.text.writer import write_dataset
from titan_attent.titan.forward_rows import COMPILED_LENGTHS, EAGER_LENGTHS, build_forward_rows, static_shapes

SEQ_LEN = 256


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    texts = ("word " * (3 + i % 300) for i in range(900))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_dataset([folder / "text.jsonl"], output=folder / "data", tokenizer="train:260")
    return folder / "data"


def built(dataset: Any, *, mask: bool = False, compiles: bool = False, attention: str = "sdpa", **dims: Any) -> Any:
    config: Any = SimpleNamespace(
        data=SimpleNamespace(document_mask=mask, max_examples_per_window=0), compile=SimpleNamespace(enable=compiles)
    )
    settings = {"pp_enabled": False, "cp_enabled": False, "tp": 1, "get_optional_mesh": lambda name: None}
    return build_forward_rows(
        config,
        dataset,
        SimpleNamespace(attn_type=attention),
        dims=SimpleNamespace(**(settings | dims)),  # type: ignore[arg-type]
        device=torch.device("cpu"),
    )


def test_the_layout_of_a_run(data: Path) -> None:
    dataset = DocumentDataset(data, seq_len=SEQ_LEN)
    assert built(TokenDataset(data, seq_len=SEQ_LEN)) is None
    packed = built(dataset, mask=True, attention="flex")
    assert packed.lengths == (SEQ_LEN,) and packed.max_examples > 1
    assert built(dataset, mask=True, attention="flex", pp_enabled=True).lengths == (SEQ_LEN,)
    short = built(dataset)
    assert len(short.lengths) == EAGER_LENGTHS and short.max_examples == 0
    assert len(built(dataset, compiles=True).lengths) == COMPILED_LENGTHS
    assert len(built(dataset, attention="flex").lengths) == COMPILED_LENGTHS
    assert built(dataset, pp_enabled=True) is None and built(dataset, cp_enabled=True) is None
    assert all(length % 24 == 0 or length == SEQ_LEN for length in built(dataset, tp=3).lengths)


class Graphs:
    """A backend of torch.compile that keeps the shape of the activations of every graph."""

    def __init__(self) -> None:
        self.shapes: list[tuple[Any, ...]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        (x,) = (value for value in values if isinstance(value, torch.Tensor) and value.ndim == 3)
        self.shapes.append(tuple(x.shape))
        return graph


@pytest.mark.parametrize("inside", [True, False])
def test_lengths_are_compiled_one_by_one_and_leave_training_static(data: Path, inside: bool) -> None:
    torch._dynamo.reset()
    rows: ForwardRows = built(DocumentDataset(data, seq_len=SEQ_LEN), compiles=True)
    graphs = Graphs()
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    batches = [torch.randn(2 * SEQ_LEN // length, length, 8) for length in rows.lengths]
    for _ in range(2):
        with static_shapes(rows if inside else None), torch.no_grad():
            for x in batches:
                torch.testing.assert_close(compiled(x), block(x))
    compiled(torch.randn(2, SEQ_LEN, 8)).sum().backward()
    static = [all(isinstance(size, int) for size in shape) for shape in graphs.shapes]
    if inside:
        assert all(static) and len(graphs.shapes) == len(rows.lengths) + 1
    else:  # what the context is for
        assert not all(static)
    torch._dynamo.reset()


def test_one_length_of_the_training_step_changes_nothing(data: Path) -> None:
    rows: ForwardRows = built(DocumentDataset(data, seq_len=SEQ_LEN), mask=True, attention="flex")
    for layout in (rows, None):
        with static_shapes(layout):
            assert torch._dynamo.config.automatic_dynamic_shapes
