"""The attention of attention.py in memory that grows with Tq + Tk: tile by tile, recomputed in the backward.

    for tiles of queries:  for tiles of keys that they see:  output += forward_tile(...)

Without a softmax the output is a plain sum over the tiles. For the softmax, a pass before computes its sums over all
keys, and the backward has one more.

It is a torch operator (``torch.ops.titan_attent.hyla_attention``), so compiled models contain it as one node, and
activation checkpointing can save its result. A row of tiles that a causal mask hides is skipped. Under the operator,
the functions of tiles.py run eagerly or compiled.

Cost: q, k, v, output and their gradients, and one tile: ``TILE_VALUES`` values per tensor. Products per query and key:
H (D + 2 V) forward, H (3 D + 5 V) backward, recomputation included. Accumulators are fp32 or wider.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from titan_attent.models.hyla import tiles
from titan_attent.models.hyla.attention import HYLA, SOFTMAX, Form, allowed

TILE_VALUES = {"cpu": 2**19, "cuda": 2**26}
"""The number of values of a tile's largest tensor: about the second cache of a core, and what fills a GPU."""
SMALLEST_TILE = 16


def tile_sizes(
    batch_size: int, num_queries: int, num_keys: int, width: int, *, max_values: int
) -> tuple[int, int, int]:
    """The rows, queries and keys of a tile, such that rows x queries x keys x ``width`` <= ``max_values``, or nearly:
    at least one row, and ``SMALLEST_TILE`` queries and keys.

    Rows are cut first, as a tile of one row has as large products. The parts of a dimension have nearly equal sizes.
    """
    longest = max(SMALLEST_TILE, int((max_values / width) ** 0.5))
    queries, keys = _even(num_queries, longest), _even(num_keys, longest)
    return max(1, min(batch_size, max_values // (queries * keys * width))), queries, keys


def _even(length: int, longest: int) -> int:
    """The size of the fewest parts of ``length`` that are at most ``longest`` each."""
    num_parts = -(-length // longest)
    return -(-length // num_parts)


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend=backend)


class _Tiling:
    """The tiles of one call, their masks and their biases.

    Args: as :func:`tiled_attention`'s.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        query_segments: Tensor | None,
        key_segments: Tensor | None,
        start: int,
        causal: bool,
        max_values: int,
    ):
        self.q, self.k, self.v, self.bias = q, k, v, bias
        self.segments = None if query_segments is None or key_segments is None else (query_segments, key_segments)
        self.start, self.causal = start, causal
        self.shape = (len(q), q.shape[1], k.shape[1])
        max_values = max_values or TILE_VALUES.get(q.device.type, TILE_VALUES["cuda"])
        width = max(q.shape[2], v.shape[3])
        self.sizes = tile_sizes(*self.shape, width, max_values=max_values)

    def queries(self) -> Iterator[tuple[slice, slice]]:
        """The rows and queries of each row of tiles."""
        for rows in _slices(self.shape[0], self.sizes[0]):
            for queries in _slices(self.shape[1], self.sizes[1]):
                yield rows, queries

    def keys(self, queries: slice) -> Iterator[slice]:
        """The keys of each tile of ``queries`` that is not wholly masked."""
        end = min(self.shape[2], self.start + queries.stop) if self.causal else self.shape[2]
        return _slices(self.shape[2], self.sizes[2], end=end)

    def tile(self, rows: slice, queries: slice, keys: slice) -> tuple[Tensor | None, ...]:
        """q, k, v, mask and bias of a tile, as tiles.py takes them."""
        bias = None if self.bias is None else self.bias[:, self.distances(queries, keys)]
        q, k, v = self.q[rows, queries], self.k[rows, keys], self.v[rows, keys]
        return q, k, v, self._mask(rows, queries, keys), bias

    def distances(self, queries: slice, keys: slice) -> Tensor:
        """How many positions a key is before a query, int64 [i, j]."""
        device = self.q.device
        places = torch.arange(self.start + queries.start, self.start + queries.stop, device=device)
        return (places[:, None] - torch.arange(keys.start, keys.stop, device=device)).clamp(min=0)

    def _mask(self, rows: slice, queries: slice, keys: slice) -> Tensor | None:
        start = self.start + queries.start - keys.start
        causal = self.causal and keys.stop - keys.start > start + 1
        if not causal and self.segments is None:
            return None
        segments = None
        if self.segments is not None:
            segments = (self.segments[0][rows, queries], self.segments[1][rows, keys])
        lengths = (queries.stop - queries.start, keys.stop - keys.start)
        return allowed(*lengths, start=start, causal=causal, segments=segments, device=self.q.device)


def _slices(length: int, size: int, *, end: int | None = None) -> Iterator[slice]:
    for first in range(0, length if end is None else end, size):
        yield slice(first, min(first + size, length))


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """An accumulator of ``shape``, or of the shape of ``like``."""
    return like.new_zeros(shape or like.shape, dtype=torch.promote_types(like.dtype, torch.float32))


def _run(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return _compiled(function, backend) if backend else function


@torch.library.custom_op("titan_attent::hyla_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    start: int,
    causal: bool,
    normalization: str,
    value_network: str,
    max_values: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output [B, Tq, H, V], and for the softmax the logarithm of its sums, [B, H, Tq]; else [0]."""
    output = _zeros(v, *q.shape[:3], v.shape[3])
    lse = output.new_full((len(q), q.shape[2], q.shape[1]), float("-inf"))
    tiling = _Tiling(q, k, v, bias, query_segments, key_segments, start, causal, max_values)
    is_softmax = normalization == SOFTMAX
    forward = _run(tiles.forward_tile, backend)
    with torch.autocast(q.device.type, enabled=False):
        for rows, queries in tiling.queries():
            of_rows = lse[rows, :, queries]
            for keys in tiling.keys(queries) if is_softmax else ():
                one, other, _, mask, tile_bias = tiling.tile(rows, queries, keys)
                scores = tiles.scores_of(one, other, mask, tile_bias, normalization=normalization)  # type: ignore[arg-type]
                of_rows.copy_(torch.logaddexp(of_rows, scores.logsumexp(dim=3)))
            total = output[rows, queries]
            for keys in tiling.keys(queries):
                tile = tiling.tile(rows, queries, keys)
                total += forward(*tile, of_rows if is_softmax else None, normalization, value_network)
    return output.to(v.dtype), lse if is_softmax else lse.new_empty(0)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    is_softmax = settings[5] == SOFTMAX
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty((len(q), q.shape[2], q.shape[1]) if is_softmax else (0,), dtype=wide)
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op("titan_attent::hyla_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    start: int,
    causal: bool,
    normalization: str,
    value_network: str,
    max_values: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and bias; of no bias [0]."""
    grad_q, grad_k, grad_v = _zeros(q), _zeros(k), _zeros(v)
    grad_bias = grad_q.new_empty(0) if bias is None else _zeros(bias)
    tiling = _Tiling(q, k, v, bias, query_segments, key_segments, start, causal, max_values)
    backward, weigh = _run(tiles.backward_tile, backend), _run(tiles.weighted_gradients, backend)
    with torch.autocast(q.device.type, enabled=False):
        for rows, queries in tiling.queries():
            part, of_rows, delta = grad[rows, queries].to(v.dtype), None, None
            if normalization == SOFTMAX:
                of_rows = lse[rows, :, queries]
                delta = torch.zeros_like(of_rows)
                for keys in tiling.keys(queries):
                    delta += weigh(*tiling.tile(rows, queries, keys), of_rows, part, value_network)
            for keys in tiling.keys(queries):
                tile = tiling.tile(rows, queries, keys)
                of_q, of_k, of_v, of_scores = backward(*tile, of_rows, part, delta, normalization, value_network)
                grad_q[rows, queries] += of_q
                grad_k[rows, keys] += of_k
                grad_v[rows, keys] += of_v
                if bias is not None:
                    distances = tiling.distances(queries, keys).flatten()
                    grad_bias.index_add_(1, distances, of_scores.sum(dim=0).flatten(1).to(grad_bias.dtype))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), grad_bias


@_attention_backward.register_fake
def _(
    grad: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *settings: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    of_bias = q.new_empty(0, dtype=wide) if bias is None else torch.empty_like(bias, dtype=wide)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), of_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bias, query_segments, key_segments, *ctx.settings = inputs
    ctx.save_for_backward(output[1], q, k, v, bias, query_segments, key_segments)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    lse, *inputs = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_bias = torch.ops.titan_attent.hyla_attention_backward(
        grad, lse, *inputs, *ctx.settings
    )
    of_bias = None if inputs[3] is None else grad_bias.to(inputs[3].dtype)
    return grad_q, grad_k, grad_v, of_bias, *(None for _ in range(2 + len(ctx.settings)))


_attention.register_autograd(_differentiate, setup_context=_keep)


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    segments: tuple[Tensor, Tensor] | None = None,
    start: int = 0,
    causal: bool = True,
    form: Form = HYLA,
    max_values: int = 0,
    backend: str = "",
) -> Tensor:
    """The attention of attention.py, [B, Tq, H, V] in the dtype of v.

    Args:
        q: float [B, Tq, H, D].
        k: float [B, Tk, G, D].
        v: float [B, Tk, G, V].
        bias: float [H, N], added to the score of a key that is 0 to N - 1 positions before the query; 0 for later keys.
            N is at least ``start`` + Tq.
        segments, start, causal: as in :func:`allowed`; the softmax needs a key that it sees for every query.
        max_values: the number of values of a tile's largest tensor; 0: ``TILE_VALUES`` of the device.
        backend: of torch.compile, which compiles the functions of tiles.py; "": they run eagerly.
    """
    query_segments, key_segments = (None, None) if segments is None else segments
    settings = (start, causal, form.normalization, form.value_network, max_values, backend)
    return torch.ops.titan_attent.hyla_attention(q, k, v, bias, query_segments, key_segments, *settings)[0]
