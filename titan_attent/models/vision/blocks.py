"""Building blocks of the image models: patches, positions, transformer blocks, and initial weights.

Weights are initialized from a normal distribution of variance 1 / inputs (LeCun et al. 1998, "Efficient BackProp"),
truncated at two standard deviations, and biases to 0. The usual deviation of 0.02 (Touvron et al. 2021, arXiv
2012.12877) suits about 768 inputs. For a patch of 4 values it is 20 times too small: the positions would dominate.

Shapes: B images, C channels, S pixels per side, P patches, D values per patch, T tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = 1e-6
INIT_STD = 0.02


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, C, S, S] -> patches [B, P, D], row by row.

    The values of a patch are in the order (row, column, channel), as in He et al. 2022.
    """
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, rows, columns, p, p]
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def sincos_positions(side: int, dim: int) -> Tensor:
    """Position embeddings fp32 [side^2, dim]: sines and cosines of the row, then of the column, half of ``dim`` each.

    Frequencies 10000^(-i / (dim/4)) for i < dim/4, as in He et al. 2022.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, dim/2]
    rows = waves[:, None].expand(side, side, -1)
    return torch.cat((rows, rows.transpose(0, 1)), dim=2).flatten(0, 1).float()


def init_normal_(tensor: Tensor) -> None:
    """Initialize learned tokens."""
    nn.init.trunc_normal_(tensor, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)


def init_linear_(linear: nn.Linear) -> None:
    """Initialize a linear layer such that its outputs have about the variance of its inputs, at any width."""
    std = linear.in_features**-0.5
    nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(linear.bias)


class EdgeLinear(nn.Linear):
    """A first or last linear layer of a model, which FSDP2 wraps separately.

    Its input may have any float dtype, its output has the dtype of its weights. The bias is added separately: otherwise
    the result is a view, and FSDP2 warns about it.
    """

    def forward(self, x: Tensor) -> Tensor:
        products = F.linear(x.to(self.weight.dtype), self.weight)
        return products + self.bias.to(products.dtype)


class Attention(nn.Module):
    """Multi-head self-attention among all tokens: [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.head_dim = dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        return self.wo(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """An MLP with one hidden layer and GELU: [B, T, dim] -> [B, T, dim]."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.gelu(self.w1(x)))


class Block(nn.Module):
    """Computes x + attention(norm(x)), then the same with the MLP; ``scale`` [B] multiplies both branches."""

    def __init__(self, dim: int, n_heads: int, hidden_dim: int):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS), nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention, self.feed_forward = Attention(dim, n_heads), FeedForward(dim, hidden_dim)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            x = x + self.attention(self.attention_norm(x))
            return x + self.feed_forward(self.ffn_norm(x))
        scale = scale.to(x.dtype)[:, None, None]
        x = x + scale * self.attention(self.attention_norm(x))
        return x + scale * self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        a, f = self.attention, self.feed_forward
        for linear in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2):
            init_linear_(linear)


def make_layers(num: int, dim: int, n_heads: int, hidden_ratio: int) -> nn.ModuleDict:
    """Create ``num`` blocks, named "0", "1", and so on."""
    return nn.ModuleDict({str(layer): Block(dim, n_heads, hidden_ratio * dim) for layer in range(num)})


def flops_of_layers(num: int, tokens: int, dim: int, hidden_ratio: int) -> int:
    """FLOPs per example of ``num`` blocks, forward and backward: 6 per weight and token, 12 dim T^2 for attention."""
    weights = (4 + 2 * hidden_ratio) * dim * dim
    return num * (6 * weights * tokens + 12 * dim * tokens**2)
