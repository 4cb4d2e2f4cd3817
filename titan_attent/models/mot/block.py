"""The block of a mixture of transformers: llama3's block, of which every expert has an own attention and feed-forward.

    h = x + p attention_e(norm(x))        y = h + p feed_forward_e(norm(h))

e is the expert of the sequence, p its probability (gate.py). The two norms' scales belong to all experts. With one
expert p is 1, and the block is llama3's: RoPE, grouped queries, causal attention, SwiGLU.

Shapes: B sequences, L tokens, D channels, H heads, K heads of keys and values, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titan_attent.models.mot.grouped import Groups, RoutedLinear, group

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rotary positions: queries [B, L, H, d], keys [B, L, K, d] and the table of the model -> both rotated."""


class RoutedAttention(nn.Module):
    """Causal attention with rotary positions and grouped queries: [B, L, D] -> [B, L, D], sorted by expert.

    Args:
        dim, n_heads, n_kv_heads: D, H, K.
        num_experts: E; 1 for one attention of all sequences.
        rotate: applies the rotary positions.
    """

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, *, num_experts: int, rotate: Rotate):
        super().__init__()
        self.head_dim, self.rotate = dim // n_heads, rotate
        self.enable_gqa = n_heads > n_kv_heads
        self.wq = RoutedLinear(dim, n_heads * self.head_dim, num_experts)
        self.wk = RoutedLinear(dim, n_kv_heads * self.head_dim, num_experts)
        self.wv = RoutedLinear(dim, n_kv_heads * self.head_dim, num_experts)
        self.wo = RoutedLinear(n_heads * self.head_dim, dim, num_experts)

    def forward(self, x: Tensor, positions: Tensor, groups: Groups) -> Tensor:
        q, k, v = (w(x, groups).unflatten(2, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, k, positions)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.enable_gqa)
        return self.wo(out.transpose(1, 2).flatten(2), groups)

    def init_weights(self, std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.trunc_normal_(self.wo.weight, std=std)


class RoutedFeedForward(nn.Module):
    """SwiGLU: [B, L, D] -> [B, L, D], sorted by expert."""

    def __init__(self, dim: int, hidden_dim: int, *, num_experts: int):
        super().__init__()
        self.w1 = RoutedLinear(dim, hidden_dim, num_experts)
        self.w2 = RoutedLinear(hidden_dim, dim, num_experts)
        self.w3 = RoutedLinear(dim, hidden_dim, num_experts)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        return self.w2(F.silu(self.w1(x, groups)) * self.w3(x, groups), groups)

    def init_weights(self, std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        for linear in (self.w2, self.w3):
            nn.init.trunc_normal_(linear.weight, std=std)


class RoutedBlock(nn.Module):
    """A block of E experts.

    Args:
        dim, n_heads, n_kv_heads: D, H, K.
        hidden_dim: width of the feed-forwards.
        num_experts: E.
        shared_attention: one attention for all experts, whose output no probability multiplies.
        norm_eps: of both norms.
        init_std: standard deviation of the initial weights of the output projections.
        rotate: applies the rotary positions.
    """

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        hidden_dim: int,
        num_experts: int,
        shared_attention: bool,
        norm_eps: float,
        init_std: float,
        rotate: Rotate,
    ):
        super().__init__()
        self.num_experts, self.shared_attention, self.init_std = num_experts, shared_attention, init_std
        of_attention = 1 if shared_attention else num_experts
        self.attention = RoutedAttention(dim, n_heads, n_kv_heads, num_experts=of_attention, rotate=rotate)
        self.feed_forward = RoutedFeedForward(dim, hidden_dim, num_experts=num_experts)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps), nn.RMSNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, positions: Tensor, route: Tensor, probability: Tensor) -> Tensor:
        """The block's output, [B, L, D].

        Args:
            x: [B, L, D].
            positions: the table of rotary positions.
            route: the expert of each sequence, int64 [B].
            probability: its probability, [B].
        """
        groups = group(route, num_experts=self.num_experts, seq_len=x.shape[1])
        x, p = x[groups.order], probability[groups.order, None, None]
        of_attention = torch.ones_like(p) if self.shared_attention else p
        h = x + (of_attention * self.attention(self.attention_norm(x), positions, groups)).to(x.dtype)
        out = h + (p * self.feed_forward(self.ffn_norm(h), groups)).to(x.dtype)
        return out[groups.inverse]

    def init_weights(self) -> None:
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        parts: tuple[Any, ...] = (self.attention, self.feed_forward)
        for part in parts:
            part.init_weights(self.init_std)


def hidden_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of llama3's feed-forward: 2/3 of 4 ``dim``, times the multiplier, rounded up to ``multiple_of``."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of
