"""The authors' transformer for real inputs, with one of the attentions: models/hyla/reference.py between two layers.

Two things make a step cheaper, and neither changes its result: the last block is computed at the positions that are
asked for only, and the attention is the plain one, which is faster than the tiled one at these lengths.
"""

import torch
from torch import Tensor, nn

from benchmarks.hyla.problems import Problem
from titan_attent.models.hyla.attention import Form, distances, plain_attention
from titan_attent.models.hyla.flavors import REFERENCE
from titan_attent.models.hyla.reference import NORM_EPS, ReferenceBlock, bucket_of, init_lecun_

METHODS: dict[str, tuple[Form, bool]] = {
    "hyla": (Form(), True),
    "softmax": (Form("softmax"), False),
    "linear": (Form("none"), False),
    "hyla_linear_values": (Form(value_network="linear"), True),
    "hyla_no_head_norm": (Form("none"), True),
    "hyla_softmax": (Form("softmax"), True),
    "linear_head_norm": (Form(), False),
}
"""Name -> the form of its attention, and whether it has a value network. The first three are those of the verdict."""


class PlainAttention(nn.Module):
    """The attention of ``method``; every token sees every token, and the queries are those of the last tokens."""

    def __init__(self, method: str):
        super().__init__()
        self.form, self.is_hypernetwork = METHODS[method]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, segments: None, bias: Tensor) -> Tensor:
        by_pair = bias[:, distances(q.shape[1], k.shape[1], start=k.shape[1] - q.shape[1])]
        return plain_attention(q, k, v, bias=by_pair, form=self.form, is_hypernetwork=self.is_hypernetwork)


def last_tokens(block: ReferenceBlock, x: Tensor, count: int) -> Tensor:
    """The block's output at the last ``count`` of T tokens, [B, count, dim]: the keys and values alone need all T."""
    attention, normed, rest = block.attention, block.attention_norm(x), x[:, -count:]
    q, k, v = (
        w(y).unflatten(2, (-1, attention.head_dim))
        for w, y in ((attention.wq, normed[:, -count:]), (attention.wk, normed), (attention.wv, normed))
    )
    num_buckets = attention.relative_bias.shape[1]
    bias = attention.relative_bias[:, bucket_of(torch.arange(x.shape[1]), num_buckets)]
    rest = rest + attention.wo(attention.inner_attention(q, k, v, segments=None, bias=bias).flatten(2))
    return rest + block.feed_forward(block.ffn_norm(rest))


class ReferenceModel(nn.Module):
    """float [B, T, W] -> [B, answers, outputs]: a linear layer, the blocks, LayerNorm, a linear layer."""

    def __init__(self, problem: Problem, task: str, method: str):
        super().__init__()
        sizes = REFERENCE[f"reference_{task}"]
        dim, self.answers = sizes["dim"], problem.answers
        self.embedding = nn.Linear(problem.width, dim)
        self.blocks = nn.ModuleList(
            ReferenceBlock(
                dim,
                n_heads=sizes["n_heads"],
                head_dim=sizes["head_dim"],
                hidden_dim=sizes["hidden_dim"],
                num_buckets=problem.length,
                inner=PlainAttention(method),
            )
            for _ in range(sizes["n_layers"])
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.output = nn.Linear(dim, problem.outputs)
        for linear in (self.embedding, self.output):
            init_lecun_(linear)
        for block in self.blocks:
            block.init_weights()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x)
        return self.output(self.norm(last_tokens(last, x, self.answers)))
