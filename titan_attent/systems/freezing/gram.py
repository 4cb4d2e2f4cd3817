"""Gram matrices of per-example gradients, without those gradients: the products that make a modular tangent kernel.

The gradient of a linear layer's matrix on example i is the sum over its tokens of g_it a_it', with a the layer's input
and g the gradient at its output. So

    G[i, j] = <grad_i, grad_j> = sum over t, t' of (a_it . a_jt') (g_it . g_jt')

which needs no gradient at all (ghost products, Goodfellow 2015; Li et al. 2022 for sequences). It takes n^2 T^2 (p + q)
products. The other way takes n T p q + n^2 p q: the gradients themselves, a block of columns at a time, each dropped
once it has been used. The cheaper of the two is taken; both are exact.

Shapes: n examples, T tokens, p inputs, q outputs. All in fp32, or fp64 where the operands are.
"""

import torch
from torch import Tensor

BLOCK = 512
"""Columns of a block of gradients: n p BLOCK numbers at a time."""


def wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def linear_gram(a: Tensor, g: Tensor) -> Tensor:
    """[n, n] of a matrix from its inputs [n, T, p] and output gradients [n, T, q]."""
    n, length, p = a.shape
    q = g.shape[-1]
    by_tokens = n * n * length * length * (p + q)
    by_columns = n * length * p * q + n * n * p * q
    return ghost_gram(wide(a), wide(g)) if by_tokens <= by_columns else column_gram(wide(a), wide(g))


def ghost_gram(a: Tensor, g: Tensor) -> Tensor:
    """By pairs of tokens; T^2 numbers at a time."""
    n = a.shape[0]
    gram = a.new_zeros(n, n)
    for i in range(n):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = ((a[i] @ a[j].T) * (g[i] @ g[j].T)).sum()
    return gram


def column_gram(a: Tensor, g: Tensor) -> Tensor:
    """By blocks of columns of the gradients."""
    gram = a.new_zeros(a.shape[0], a.shape[0])
    for columns in g.split(BLOCK, dim=-1):
        gradients = torch.einsum("itp,itq->ipq", a, columns).flatten(1)
        gram += gradients @ gradients.T
    return gram


def bias_gram(g: Tensor) -> Tensor:
    """[n, n] of a bias from the output gradients [n, T, q]."""
    gradients = wide(g).sum(dim=1)
    return gradients @ gradients.T


def embedding_gram(tokens: Tensor, g: Tensor) -> Tensor:
    """[n, n] of an embedding from token ids int64 [n, T] and output gradients [n, T, q]: rows meet where ids do."""
    n, g = tokens.shape[0], wide(g)
    gram = g.new_zeros(n, n)
    for i in range(n):
        for j in range(i + 1):
            same = (tokens[i][:, None] == tokens[j][None, :]).to(g.dtype)
            gram[i, j] = gram[j, i] = (same * (g[i] @ g[j].T)).sum()
    return gram


def cross_gram(tokens: Tensor, g: Tensor, a: Tensor, g_out: Tensor) -> Tensor:
    """[n, n] of an embedding's part against an output's of the same matrix: G[i, j] = <embedding_i, output_j>.

    Args:
        tokens, g: int64 [n, T] and [n, T, d], of the embedding.
        a, g_out: [n, T, d] and [n, T, V], of the output.
    """
    n, g, a, g_out = tokens.shape[0], wide(g), wide(a), wide(g_out)
    return torch.stack(
        [torch.stack([((g[i] @ a[j].T) * g_out[j][:, tokens[i]].T).sum() for j in range(n)]) for i in range(n)]
    )


def principal_eigenvalues(grams: Tensor) -> Tensor:
    """fp64 [...] on the CPU: the largest eigenvalue of each of fp [..., n, n]; NaN where one is not finite."""
    grams = grams.double().cpu()
    finite = grams.isfinite().all(dim=-1).all(dim=-1)
    values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], grams, torch.zeros_like(grams)))[..., -1]
    return torch.where(finite, values, torch.full_like(values, float("nan")))
