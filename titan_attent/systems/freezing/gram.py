"""Gram matrices of per-example gradients, without storing those gradients.

The gradient of a linear layer's matrix on example i is the sum over its tokens t of g_it a_it'. Here a is the layer's
input and g the gradient at its output. So

    G[i, j] = <grad_i, grad_j> = sum over t, t' of (a_it . a_jt') (g_it . g_jt')

which needs no weight gradient (ghost products, Goodfellow 2015; Li et al. 2022 for sequences).

Cost: n^2 T^2 (p + q) multiplications. The alternative computes the gradients, one chunk of columns at a time, and drops
each chunk after use: n T p q + n^2 p q. Both are exact, and the cheaper one is used.

Shapes: n examples, T tokens, p inputs, q outputs. All in fp32, or in fp64 if the operands are.
"""

import torch
from torch import Tensor

CHUNK = 512
"""Columns per chunk of gradients, so that n p CHUNK numbers are in memory at a time."""


def at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear_gram(a: Tensor, g: Tensor) -> Tensor:
    """The Gram matrix [n, n] of a linear layer's matrix, from inputs [n, T, p] and output gradients [n, T, q]."""
    n, length, p = a.shape
    q = g.shape[-1]
    by_tokens = n * n * length * length * (p + q)
    by_columns = n * length * p * q + n * n * p * q
    gram = ghost_gram if by_tokens <= by_columns else column_gram
    return gram(at_least_fp32(a), at_least_fp32(g))


def ghost_gram(a: Tensor, g: Tensor) -> Tensor:
    """The same from products of pairs of tokens, with T^2 numbers in memory at a time."""
    n = a.shape[0]
    gram = a.new_zeros(n, n)
    for i in range(n):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = ((a[i] @ a[j].T) * (g[i] @ g[j].T)).sum()
    return gram


def column_gram(a: Tensor, g: Tensor) -> Tensor:
    """The same from the gradients, one chunk of columns at a time."""
    gram = a.new_zeros(a.shape[0], a.shape[0])
    for columns in g.split(CHUNK, dim=-1):
        gradients = torch.einsum("itp,itq->ipq", a, columns).flatten(1)
        gram += gradients @ gradients.T
    return gram


def bias_gram(g: Tensor) -> Tensor:
    """The Gram matrix [n, n] of a bias, from the output gradients [n, T, q]."""
    gradients = at_least_fp32(g).sum(dim=1)
    return gradients @ gradients.T


def embedding_gram(tokens: Tensor, g: Tensor) -> Tensor:
    """The Gram matrix [n, n] of an embedding, from token ids int64 [n, T] and output gradients [n, T, q].

    Only tokens with equal ids contribute.
    """
    n, g = tokens.shape[0], at_least_fp32(g)
    gram = g.new_zeros(n, n)
    for i in range(n):
        for j in range(i + 1):
            same = (tokens[i][:, None] == tokens[j][None, :]).to(g.dtype)
            gram[i, j] = gram[j, i] = (same * (g[i] @ g[j].T)).sum()
    return gram


def cross_gram(tokens: Tensor, g: Tensor, a: Tensor, g_out: Tensor) -> Tensor:
    """Inner products [n, n] between the two gradients of a tied matrix: G[i, j] = <embedding_i, output_j>.

    Args:
        tokens: int64 [n, T], token ids.
        g: [n, T, d], gradients at the embedding's output.
        a: [n, T, d], inputs of the output layer.
        g_out: [n, T, V], gradients at the output layer's output.
    """
    n, g, a, g_out = tokens.shape[0], at_least_fp32(g), at_least_fp32(a), at_least_fp32(g_out)
    return torch.stack(
        [torch.stack([((g[i] @ a[j].T) * g_out[j][:, tokens[i]].T).sum() for j in range(n)]) for i in range(n)]
    )


def principal_eigenvalues(grams: Tensor) -> Tensor:
    """The largest eigenvalue of each matrix in [..., n, n]: fp64 [...] on the CPU; NaN if a matrix is not finite."""
    grams = grams.double().cpu()
    finite = grams.isfinite().all(dim=-1).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], grams, torch.zeros_like(grams)))[..., -1]
    return torch.where(finite, values, torch.full_like(values, float("nan")))
