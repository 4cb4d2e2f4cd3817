"""The two problems of the distillation experiment: rows of a learning task, a source and a student, and their costs.

parity   sparse_parity of 3 of 50 bits. Networks with one hidden layer, SGD, as in the reference code of the paper, at a
         smaller size.
pcfg     sentences of cfg3f from the symbol 13 (8 to 27 words), labels at the ends of constituents of height 1.
         torchtitan's llama3.

Rows are inputs [B, ...] and labels int64 [B, L], ``IGNORE_INDEX`` where none counts; a model gives logits [B, L, V].
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import titan_attent.titan.patches.compat  # noqa: F401

import numpy as np
import torch
from torch import Tensor, nn
from torchtitan.models.llama3 import TransformerModelArgs
from torchtitan.models.llama3.model.model import Transformer

from titan_attent.foundations.flops import matrix_flops, product_flops
from titan_attent.losses.cross_entropy import IGNORE_INDEX
from titan_attent.tasks.pcfg import Pcfg
from titan_attent.tasks.sparse_parity import SparseParity
from titan_attent.tasks.task import IN_DISTRIBUTION, TRAIN, Task

STUDENT_ROWS = 2**24
"""The first row of a student: none of them is a row of its source."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The sizes of a problem, which are part of the identity of its results.

    Attributes:
        target: accuracy to reach, as a share of the source's last one.
        source_steps, save_every: steps of the source; a checkpoint every so many.
        steps: of a student.
        every: steps between two evaluations, on ``evaluated`` rows.
    """

    together: ClassVar[bool] = False
    """Whether the students of a seed are trained in one batched model, where that is quicker."""

    name: str
    target: float
    source_steps: int
    save_every: int
    steps: int
    batch: int
    learning_rate: float
    every: int
    evaluated: int
    source_width: int
    student_width: int

    def task(self, seed: int) -> Task:
        raise NotImplementedError

    def rows(self, seed: int, split: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the rows from number ``first`` on."""
        raise NotImplementedError

    def model(self, *, source: bool, seed: int) -> nn.Module:
        raise NotImplementedError

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        raise NotImplementedError

    def forward_flops(self, model: nn.Module) -> float:
        """FLOPs of the forward pass of one row."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a result has to agree with."""
        return asdict(self)

    def held_out(self, seed: int) -> tuple[Tensor, Tensor]:
        return self.rows(seed, IN_DISTRIBUTION, 0, self.evaluated)

    def training_rows(self, seed: int, *, step: int, steps: int, source: bool) -> tuple[Tensor, Tensor]:
        """The rows of ``steps`` steps from the 0-based ``step`` on."""
        return self.rows(seed, TRAIN, (0 if source else STUDENT_ROWS) + step * self.batch, steps * self.batch)


class OneHiddenLayer(nn.Module):
    """Logits [B, 1, 2] of rows [B, bits] of -1 and 1; initialised as torch's Linear."""

    def __init__(self, bits: int, width: int):
        super().__init__()
        self.hidden, self.output = nn.Linear(bits, width), nn.Linear(width, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.output(self.hidden(rows).relu())[:, None]


@dataclass(frozen=True, kw_only=True)
class Parity(Problem):
    together: ClassVar[bool] = True
    name: str = "parity"
    target: float = 0.95
    source_steps: int = 4000
    save_every: int = 250
    steps: int = 4000
    batch: int = 32
    learning_rate: float = 0.1
    every: int = 100
    evaluated: int = 2048
    source_width: int = 1000
    student_width: int = 50
    bits: int = 50
    k: int = 3

    def task(self, seed: int) -> SparseParity:
        return SparseParity(bits=self.bits, k=self.k, seed=seed)

    def rows(self, seed: int, split: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        words = self.task(seed).rows(split, np.arange(first, first + count)).words
        table = torch.from_numpy(words.astype(np.int64)).view(count, self.bits + 2)
        return table[:, : self.bits].float() * 2 - 1, table[:, -1:]

    def model(self, *, source: bool, seed: int) -> nn.Module:
        torch.manual_seed(2 * seed + source)
        return OneHiddenLayer(self.bits, self.source_width if source else self.student_width)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.learning_rate)

    def forward_flops(self, model: nn.Module) -> float:
        return sum(matrix_flops(layer, None, seq_len=1) for layer in model.modules())


@dataclass(frozen=True, kw_only=True)
class Grammar(Problem):
    name: str = "pcfg"
    target: float = 0.95
    source_steps: int = 600
    save_every: int = 50
    steps: int = 800
    batch: int = 32
    learning_rate: float = 3e-3
    every: int = 25
    evaluated: int = 512
    source_width: int = 64
    student_width: int = 16
    root: int = 13
    height: int = 1
    longest: int = 27
    source_layers: int = 2
    student_layers: int = 1

    def task(self, seed: int) -> Pcfg:
        return Pcfg(root=self.root, height=self.height, seed=seed)

    def rows(self, seed: int, split: str, first: int, count: int) -> tuple[Tensor, Tensor]:
        rows = self.task(seed).rows(split, np.arange(first, first + count))
        lengths = np.diff(rows.ends, prepend=0)
        row = np.repeat(np.arange(count), lengths)
        column = np.arange(len(rows.words)) - np.repeat(rows.ends - lengths, lengths)
        words = np.zeros((count, self.longest + 1), dtype=np.int64)
        labels = np.full(words.shape, IGNORE_INDEX)
        words[row, column] = rows.words
        labels[row, column] = np.where(rows.counts, rows.words, IGNORE_INDEX)
        return torch.from_numpy(words[:, :-1]), torch.from_numpy(labels[:, 1:])

    def model(self, *, source: bool, seed: int) -> nn.Module:
        torch.manual_seed(2 * seed + source)
        width, layers = (self.source_width, self.source_layers) if source else (self.student_width, self.student_layers)
        model = Transformer(
            TransformerModelArgs(
                dim=width,
                n_layers=layers,
                n_heads=width // 8,
                vocab_size=len(self.task(seed).words()),
                multiple_of=16,
                rope_theta=10000,
                max_seq_len=self.longest,
            )
        )
        with torch.no_grad():
            model.init_weights()
        return model

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def forward_flops(self, model: nn.Module) -> float:
        args: Any = model.model_args
        products = product_flops(args, seq_len=self.longest) * args.n_layers
        return products + sum(matrix_flops(layer, args, seq_len=self.longest) for layer in model.modules())


PROBLEMS: dict[str, Problem] = {problem.name: problem for problem in (Parity(), Grammar())}
