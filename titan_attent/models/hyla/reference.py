"""The blocks of the authors' transformer: pre-norm, LayerNorm, biases, a GELU MLP, T5's relative positions.

After the code of Schug et al. (github.com/smonsays/hypernetwork-attention, at af9805f: hyla/models/transformer.py,
attention.py, position.py, feedforward.py), in which each block has its own table of relative positions with as many
buckets as a row has positions, later keys are in bucket 0, and no mask is causal. Weights are initialised as there:
from a normal distribution of variance 1 / inputs, cut at two standard deviations and scaled to that variance.

Shapes: as in attention.py, with T positions.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
_STD_OF_CUT = 0.87962566103423978
"""The standard deviation of a normal distribution that is cut at two of its own."""


def init_lecun_(linear: nn.Linear) -> None:
    """Initialise a linear layer as Flax does: variance 1 / inputs, cut at two standard deviations; biases 0."""
    std = linear.in_features**-0.5 / _STD_OF_CUT
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def bucket_of(distances: Tensor, num_buckets: int) -> Tensor:
    """T5's bucket of a distance, int64: exact below half of the buckets, then logarithmic up to ``num_buckets``.

    Args:
        distances: int64, at least 0.
        num_buckets: the number of buckets, and the distance from which all are in the last one.
    """
    num_exact = num_buckets // 2
    if num_exact == 0:
        return torch.zeros_like(distances)
    share = (distances / num_exact + torch.finfo(torch.float32).eps).log() / math.log(num_buckets / num_exact)
    large = num_exact + (share * (num_buckets - num_exact)).long()
    return torch.where(distances < num_exact, distances, large.clamp(max=num_buckets - 1))


class ReferenceAttention(nn.Module):
    """The authors' attention layer: [B, T, dim] -> [B, T, dim].

    Args:
        dim: width of a token.
        n_heads: H.
        head_dim: D and V, the width of a head's query, key and value.
        num_buckets: of the table of relative positions.
        inner: q, k, v -> outputs, as layer.py's ``HyperAttention``.
    """

    def __init__(self, dim: int, *, n_heads: int, head_dim: int, num_buckets: int, inner: nn.Module):
        super().__init__()
        self.head_dim = head_dim
        self.wq, self.wk, self.wv = (nn.Linear(dim, n_heads * head_dim) for _ in range(3))
        self.wo = nn.Linear(n_heads * head_dim, dim)
        self.relative_bias = nn.Parameter(torch.empty(n_heads, num_buckets))
        self.inner_attention = inner

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        q, k, v = (w(x).unflatten(2, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        num_buckets = self.relative_bias.shape[1]
        # A row has as many positions as buckets, at most; context parallelism has part of them here.
        buckets = bucket_of(torch.arange(max(num_buckets, x.shape[1]), device=x.device), num_buckets)
        bias = self.relative_bias[:, buckets]
        return self.wo(self.inner_attention(q, k, v, segments=segments, bias=bias).flatten(2))

    def init_weights(self) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wo):
            init_lecun_(linear)
        nn.init.normal_(self.relative_bias, std=self.relative_bias.shape[1] ** -0.5)


class FeedForward(nn.Module):
    """An MLP with one hidden layer and the tanh form of GELU: [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class ReferenceBlock(nn.Module):
    """x + attention(norm(x)), then the same with the MLP. Its modules have the names of torchtitan's llama3.

    Args: as :class:`ReferenceAttention`'s, and the ``hidden_dim`` of the MLP.
    """

    def __init__(self, dim: int, *, n_heads: int, head_dim: int, hidden_dim: int, num_buckets: int, inner: nn.Module):
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(dim, eps=NORM_EPS) for _ in range(2))
        self.attention = ReferenceAttention(
            dim, n_heads=n_heads, head_dim=head_dim, num_buckets=num_buckets, inner=inner
        )
        self.feed_forward = FeedForward(dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor | None = None,
        attention_masks: Tensor | None = None,
        positions: object = None,
    ) -> Tensor:
        """The block's output [B, T, dim].

        Args:
            attention_masks: int [B, T], the number of each token's document, or None.
            freqs_cis, positions: llama3's, not read: positions are relative.
        """
        x = x + self.attention(self.attention_norm(x), attention_masks)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        self.attention.init_weights()
        for linear in (self.feed_forward.w1, self.feed_forward.w2):
            init_lecun_(linear)
