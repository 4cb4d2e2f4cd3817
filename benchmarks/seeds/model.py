"""Two small models that randomness can help, and their loss per row.

    recall       one layer of causal linear attention: its memory is a matrix of ``width`` x ``width`` numbers per head,
                 too small for all pairs of a row
    colouring    ``rounds`` layers of attention in which a node of the cycle sees itself and its two neighbours

Both see the seed of the row everywhere: the bits of a row of ``recall`` are added to each of its pairs, the priority of
a node of ``graph_colouring`` to that node. Without randomness both would be functions of the input alone.

The loss of a row of ``recall`` is the cross-entropy of the value. That of a row of ``graph_colouring`` is of any proper
colouring, as in the paper: with independent colours of the nodes, the mean over the edges of the negative
log-probability that their two colours differ.

Shapes: B rows, P pairs, N nodes, D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_attent.tasks.graph_colouring import COLOURS, GraphColouring
from titan_attent.tasks.recall import Recall


class SeededModel(Protocol):
    """A model with its own loss."""

    def rows(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words of rows, int64 [B, T] -> (losses, fp32 [B], with a graph; answers, int64 [B, L]; right, bool [B])."""


def _mlp(width_in: int, width: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width_out))


class LinearRecall(nn.Module):
    """One layer of causal linear attention over pairs; the query comes last, so its memory is the sum over all pairs.

    Args:
        task: its keys, values, pairs and seed bits.
        width: of embeddings and the hidden layers.
        memory: width of keys and values of the one head: it holds about as many pairs.
    """

    def __init__(self, task: Recall, *, width: int = 32, memory: int = 2):
        super().__init__()
        self.task = task
        self.key_embedding = nn.Embedding(task.keys, width)
        self.value_embedding = nn.Embedding(task.values, width)
        self.seed = nn.Linear(task.seed_bits, width, bias=False)
        self.write_key, self.write_value = _mlp(width, width, memory), _mlp(width, width, memory)
        self.read = _mlp(width, width, memory)
        self.answer = _mlp(memory + width, width, task.values)

    def rows(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        task = self.task
        bits, pairs = words[:, : task.seed_bits].float(), words[:, task.seed_bits : -3].view(len(words), task.pairs, 2)
        keys, values = pairs[..., 0] - 3, pairs[..., 1] - 3 - task.keys
        seed = self.seed(2 * bits - 1)
        x_BPD = self.key_embedding(keys) + self.value_embedding(values) + seed[:, None]
        query_BD = self.key_embedding(words[:, -2] - 3) + seed
        memory = self.write_key(x_BPD).transpose(1, 2) @ self.write_value(x_BPD)
        found = (self.read(query_BD)[:, None] @ memory)[:, 0]
        logits = self.answer(torch.cat((found, query_BD), dim=1))
        target = words[:, -1] - 3 - task.keys
        answers = logits.argmax(dim=1, keepdim=True)
        return F.cross_entropy(logits, target, reduction="none"), answers, answers[:, 0] == target


class LocalColouring(nn.Module):
    """Layers in which each node sees itself and its two neighbours.

    Args:
        task: its number of nodes.
        width: of the nodes' states.
        rounds: layers: a node sees as many nodes to either side.
    """

    def __init__(self, task: GraphColouring, *, width: int = 32, rounds: int = 1):
        super().__init__()
        self.nodes = task.nodes
        self.node, self.priority = nn.Embedding(task.nodes, width), nn.Embedding(task.nodes, width)
        self.layers = nn.ModuleList(_mlp(3 * width, width, width) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.answer = nn.Linear(width, COLOURS)

    def rows(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, first = self.nodes, 2 + COLOURS
        priorities = words[:, :n] - first - n
        edges = (words[:, n + 1 : 3 * n + 1] - first).view(len(words), n, 2)
        ends = torch.cat((edges, edges.flip(2)), dim=1)
        # The two neighbours of each node, in the order of the edges.
        order = ends[..., 0].argsort(dim=1, stable=True)
        neighbours = ends[..., 1].gather(1, order).view(len(words), n, 2)
        x = self.node.weight + self.priority(priorities)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = norm(x)
            left, right = (y.gather(1, neighbours[..., i : i + 1].expand_as(y)) for i in (0, 1))
            x = x + layer(torch.cat((y, left + right, left * right), dim=2))
        p = self.answer(x).softmax(dim=2)
        one, other = (p.gather(1, edges[..., i : i + 1].expand(-1, -1, COLOURS)) for i in (0, 1))
        conflicts = (one * other).sum(dim=2)
        colours = p.argmax(dim=2)
        proper = (colours.gather(1, edges[..., 0]) != colours.gather(1, edges[..., 1])).all(dim=1)
        return -torch.log1p(-conflicts.clamp(max=1 - 1e-6)).mean(dim=1), colours, proper
