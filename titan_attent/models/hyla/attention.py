"""Attention as a hypernetwork, written out: the definition, and the reference for tiled.py.

    s_hqk = q_hq . k_hk / sqrt(d)          a_hqk = s_hqk / sqrt(mean over heads of s_hqk^2 + eps)
    o_hq  = sum over keys k of  a_hqk ReLU(sum over heads g of  a_gqk v_gk)

For one query and key the scores of all heads are a code. The code chooses the weights of a network of two layers, the
value network: its first layer sums the heads' values by the code, its second layer distributes the result over the
heads by the same code. Without the ReLU the network is linear. In softmax attention, the first layer is missing: a head
reads its own values only.

Nothing bounds the sum over the keys, so the output grows with their number; the ``output_norm`` of layer.py is for it.

Source: Schug et al., "Attention as a hypernetwork" (ICLR 2025, arXiv 2406.05816), HYLA.

Cost: the scores [B, H, Tq, Tk] and the hidden values [B, Tq, Tk, V] in full; tiled.py needs neither.

Shapes: B rows, Tq queries, Tk keys, H heads of queries, G of keys and values (H is a multiple of G), D the width of
a head of queries and keys, V that of values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from titan_attent.models.hyla.config import NORMALIZATIONS, VALUE_NETWORKS

RMS_HEAD, SOFTMAX, NONE = NORMALIZATIONS
RELU, LINEAR = VALUE_NETWORKS
NORM_EPS = 1e-6


class Form(NamedTuple):
    """The form of the attention.

    Attributes:
        normalization: of the scores: ``"rms_head"`` over the heads, ``"softmax"`` over the keys, or ``"none"``.
        value_network: between its layers, ``"relu"``, or nothing, ``"linear"``.
    """

    normalization: str = RMS_HEAD
    value_network: str = RELU


HYLA = Form()
"""The form of the paper."""


def allowed(
    num_queries: int,
    num_keys: int,
    *,
    start: int,
    causal: bool,
    segments: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The mask of the attention: bool [B, Tq, Tk], or [1, Tq, Tk] without segments; True where a query sees a key.

    Args:
        start: the position of the first query among the keys.
        causal: whether a query sees no later key.
        segments: integers [B, Tq] and [B, Tk]; a query sees only keys of its own segment.
    """
    mask = torch.ones(1, num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        mask = mask.tril(start)
    if segments is not None:
        mask = mask & (segments[0][:, :, None] == segments[1][:, None, :])
    return mask


def distances(num_queries: int, num_keys: int, *, start: int, device: torch.device | None = None) -> Tensor:
    """How many positions a key is before a query, int64 [Tq, Tk]; 0 for later keys. ``start`` as in :func:`allowed`."""
    queries = torch.arange(start, start + num_queries, device=device)
    return (queries[:, None] - torch.arange(num_keys, device=device)).clamp(min=0)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    form: Form = HYLA,
    is_hypernetwork: bool = True,
) -> Tensor:
    """The definition, for one size of memory: Tq x Tk.

    Args:
        q: float [B, Tq, H, D].
        k: float [B, Tk, G, D].
        v: float [B, Tk, G, V].
        mask: bool [B, Tq, Tk], True where a query sees a key. Other scores are 0, or -inf for the softmax.
        bias: float [H, Tq, Tk], added to the scores.
        is_hypernetwork: False for multi-head attention with the same scores, which has no value network:
            o_hq = sum_k a_hqk v_hk. With ``"softmax"`` it is softmax attention, with ``"none"`` linear attention.

    Returns:
        [B, Tq, H, V], in the dtype of v.
    """
    num_repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(num_repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf") if form.normalization == SOFTMAX else 0.0)
    if form.normalization == SOFTMAX:
        scores = scores.softmax(dim=3)
    elif form.normalization == RMS_HEAD:
        scores = scores * (scores.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
    if not is_hypernetwork:
        return torch.einsum("bhqk,bkhv->bqhv", scores, v)
    hidden = torch.einsum("bhqk,bkhv->bqkv", scores, v)
    if form.value_network == RELU:
        hidden = hidden.relu()
    return torch.einsum("bhqk,bqkv->bqhv", scores, hidden)
