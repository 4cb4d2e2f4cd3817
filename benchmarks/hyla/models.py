"""The authors' transformer for real inputs, with one of the attentions: models/hyla/reference.py between two layers."""

from torch import Tensor, nn

from benchmarks.hyla.problems import Problem
from titan_attent.models.hyla.attention import Form, distances, plain_attention
from titan_attent.models.hyla.flavors import REFERENCE
from titan_attent.models.hyla.layer import HyperAttention
from titan_attent.models.hyla.reference import NORM_EPS, ReferenceBlock, init_lecun_

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


class MultiHeadAttention(nn.Module):
    """Attention without a value network, such as softmax attention; every token sees every token."""

    def __init__(self, form: Form):
        super().__init__()
        self.form = form

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, segments: None, bias: Tensor) -> Tensor:
        length = q.shape[1]
        by_pair = bias[:, distances(length, length, start=0)]
        return plain_attention(q, k, v, bias=by_pair, form=self.form, is_hypernetwork=False)


class ReferenceModel(nn.Module):
    """float [B, T, W] -> [B, T, outputs]: a linear layer, the blocks, LayerNorm, a linear layer."""

    def __init__(self, problem: Problem, task: str, method: str):
        super().__init__()
        sizes = REFERENCE[f"reference_{task}"]
        form, is_hypernetwork = METHODS[method]
        dim = sizes["dim"]
        self.embedding = nn.Linear(problem.width, dim)
        self.blocks = nn.ModuleList(
            ReferenceBlock(
                dim,
                n_heads=sizes["n_heads"],
                head_dim=sizes["head_dim"],
                hidden_dim=sizes["hidden_dim"],
                num_buckets=problem.length,
                inner=HyperAttention(form, causal=False) if is_hypernetwork else MultiHeadAttention(form),
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
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x))
