"""One tile of the attention of attention.py and its gradients: some queries, some keys, all heads.

The products are batched matrix products over the rows and one of (head, query, key); no tensor is larger than the
tile's scores or hidden values. tiled.py compiles these functions.

Shapes: as in attention.py, with i queries and j keys of the tile, and G x R = H heads, R queries' heads per head of
keys. Scores and weights are [B, H, i, j], hidden values [B, j, i, V].
"""

import torch
from torch import Tensor

from titan_attent.models.hyla.attention import NORM_EPS, RELU, RMS_HEAD, SOFTMAX


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, *, normalization: str) -> Tensor:
    """The masked scores [B, H, i, j] before they are normalised, fp32 or wider.

    Args:
        q: [B, i, H, D].
        k: [B, j, G, D].
        mask: bool [B or 1, i, j].
        bias: [H, i, j].
    """
    batch_size, num_queries, num_heads, width = q.shape
    num_kv_heads = k.shape[2]
    by_head = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(batch_size, num_kv_heads, -1, width)
    scores = (by_head @ k.permute(0, 2, 3, 1)).view(batch_size, num_heads, num_queries, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * width**-0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf") if normalization == SOFTMAX else 0.0)
    return scores


def weights_of(scores: Tensor, lse: Tensor | None, *, normalization: str) -> tuple[Tensor, Tensor | None]:
    """The weights a [B, H, i, j], and 1 / the norm over the heads [B, 1, i, j] if there is one.

    Args:
        lse: [B, H, i], the logarithm of the softmax's sum over all keys; for the softmax only.
    """
    if normalization == SOFTMAX:
        assert lse is not None
        return (scores - lse[..., None]).exp(), None
    if normalization == RMS_HEAD:
        inverse = (scores.square().mean(dim=1, keepdim=True) + NORM_EPS).rsqrt()
        return scores * inverse, inverse
    return scores, None


def _by_key(weights: Tensor, num_kv_heads: int) -> Tensor:
    """The weights of the heads that share values, summed: [B, H, i, j] -> [B, j, G, i]."""
    if num_kv_heads < weights.shape[1]:
        weights = weights.unflatten(1, (num_kv_heads, -1)).sum(dim=2)
    return weights.permute(0, 3, 1, 2).contiguous()


def forward_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor | None,
    normalization: str,
    value_network: str,
) -> Tensor:
    """The keys' part of the output, [B, i, H, V]. Arguments as in the functions above; v is [B, j, G, V]."""
    weights, _ = weights_of(scores_of(q, k, mask, bias, normalization=normalization), lse, normalization=normalization)
    weights = weights.to(v.dtype)
    hidden = _by_key(weights, v.shape[2]).transpose(2, 3) @ v
    if value_network == RELU:
        hidden = hidden.relu_()
    return weights.transpose(1, 2) @ hidden.transpose(1, 2)


def backward_tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor | None,
    grad: Tensor,
    delta: Tensor | None,
    normalization: str,
    value_network: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and of the scores, for the tile's part of the output.

    Args:
        grad: the gradient of the output, [B, i, H, V].
        delta: [B, H, i], for the softmax: the sum over all keys of weight x its gradient (:func:`weighted_gradients`).
    """
    scores = scores_of(q, k, mask, bias, normalization=normalization)
    weights, inverse = weights_of(scores, lse, normalization=normalization)
    grad_weights, grad_hidden, by_key = _gradients(weights.to(v.dtype), v, grad, value_network)
    grad_v = by_key @ grad_hidden.transpose(1, 2)
    if normalization == SOFTMAX:
        assert delta is not None
        grad_scores = weights * (grad_weights - delta[..., None])
    elif inverse is not None:
        along = (grad_weights * weights).mean(dim=1, keepdim=True)
        grad_scores = (grad_weights - weights * along) * inverse
    else:
        grad_scores = grad_weights
    # A masked pair has weights of 0, and both layers of its value network are multiplied by them: its gradients are 0.
    num_kv_heads, width = k.shape[2], q.shape[3]
    scaled = (grad_scores * width**-0.5).to(q.dtype)
    grad_q = (scaled.unflatten(1, (num_kv_heads, -1)).flatten(2, 3) @ k.transpose(1, 2)).view(
        len(q), q.shape[2], q.shape[1], width
    )
    by_head = q.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).reshape(len(q), num_kv_heads, -1, width)
    grad_k = scaled.unflatten(1, (num_kv_heads, -1)).flatten(2, 3).transpose(2, 3) @ by_head
    return grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v, grad_scores


def weighted_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor | None,
    grad: Tensor,
    value_network: str,
) -> Tensor:
    """The sum over the tile's keys of weight x its gradient, [B, H, i], for the softmax."""
    weights, _ = weights_of(scores_of(q, k, mask, bias, normalization=SOFTMAX), lse, normalization=SOFTMAX)
    grad_weights, _, _ = _gradients(weights.to(v.dtype), v, grad, value_network)
    return (weights * grad_weights).sum(dim=3)


def _gradients(weights: Tensor, v: Tensor, grad: Tensor, value_network: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the weights [B, H, i, j] and of the hidden values [B, i, j, V], and the weights by key."""
    by_key = _by_key(weights, v.shape[2])
    hidden = by_key.transpose(2, 3) @ v
    grad_hidden = weights.permute(0, 2, 3, 1) @ grad
    if value_network == RELU:
        hidden = hidden.relu_()
        # The gradient where the result is above 0: on a CPU far faster than a product with a mask.
        grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden.transpose(1, 2), 0)
    # The products with the heads as columns, [B, i, j, H] and [B, j, i, G], are the faster ones, too.
    second = (hidden.transpose(1, 2) @ grad.transpose(2, 3)).permute(0, 3, 1, 2)
    first = (grad_hidden.transpose(1, 2) @ v.transpose(2, 3)).permute(0, 3, 2, 1)
    if v.shape[2] < weights.shape[1]:
        first = first.repeat_interleave(weights.shape[1] // v.shape[2], dim=1)
    total = (first + second).to(torch.promote_types(v.dtype, torch.float32))
    return total.contiguous(), grad_hidden, by_key  # the scores' own layout
