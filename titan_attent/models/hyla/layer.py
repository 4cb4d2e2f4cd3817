"""The module that computes the attention of a model: tile by tile, and under context parallelism over all ranks' keys.

Under context parallelism a rank has some positions of every row. The attention without a softmax is a sum over keys, so
a rank could add up key blocks in any order; here one all-gather per layer brings the keys and values of all ranks, and
the tiles are the sum's blocks. A rank with two spans of positions (torchtitan's "headtail" load balancer) handles one
after the other, each with the keys before it only.

Cost under context parallelism: per layer one all-gather of k and v, and in the backward one reduce-scatter of their
gradients; the keys and values of the whole rows on every rank.

Shapes: as in attention.py; n ranks of context parallelism, each with T / n positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from titan_attent.models.hyla.attention import NORM_EPS, Form
from titan_attent.models.hyla.tiled import tiled_attention

# Its name since torch 2.13, which warns of the former one.
_NAME = "all_gather_single_autograd"
_all_gather = getattr(collectives, _NAME if hasattr(collectives, _NAME) else "all_gather_tensor_autograd")


@dataclass(frozen=True)
class Spread:
    """The positions of this rank.

    Attributes:
        mesh: the mesh of context parallelism.
        balanced: whether the rank r of n has the spans r and 2 n - 1 - r of 2 n, instead of the span r of n.
    """

    mesh: DeviceMesh
    balanced: bool

    @property
    def spans(self) -> list[int]:
        """The numbers of this rank's spans, in the order in which it holds them."""
        rank, size = self.mesh.get_local_rank(), self.mesh.size()
        return [rank, 2 * size - 1 - rank] if self.balanced else [rank]

    def gather(self, x: Tensor) -> Tensor:
        """This rank's [B, T / n, ...] -> all ranks' [B, T, ...], in the order of the positions. A collective."""
        size = self.mesh.size()
        gathered = _all_gather(x.contiguous(), gather_dim=1, group=self.mesh.get_group())
        if not self.balanced:
            return gathered
        spans = gathered.chunk(2 * size, dim=1)
        held = [span for rank in range(size) for span in (rank, 2 * size - 1 - rank)]
        return torch.cat([spans[held.index(span)] for span in range(2 * size)], dim=1)


class HyperAttention(nn.Module):
    """q, k, v -> the heads' outputs; it has no parameters.

    Args:
        form: the form of the attention.
        causal: whether a query sees no later key.
        output_norm: whether each head's output is divided by its root mean square over V.
    """

    spread: Spread | None = None
    backend = ""

    def __init__(self, form: Form, *, causal: bool = True, output_norm: bool = False):
        super().__init__()
        self.form, self.causal, self.output_norm = form, causal, output_norm

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, segments: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The outputs [B, T, H, V], of this rank's T / n positions under context parallelism.

        Args:
            q: [B, T, H, D].
            k: [B, T, G, D].
            v: [B, T, G, V].
            segments: int [B, T], such as the numbers of documents; a query sees its own segment only. None under
                context parallelism.
            bias: [H, N] as for ``tiled_attention``, with N the length of whole rows.
        """
        if self.spread is None:
            pair = None if segments is None else (segments, segments)
            output = self._attend(q, k, v, segments=pair, bias=bias, start=0)
        else:
            assert segments is None, "segments under context parallelism"
            spans = self.spread.spans
            k, v = self.spread.gather(torch.cat((k, v), dim=3)).split((k.shape[3], v.shape[3]), dim=3)
            length = q.shape[1] // len(spans)
            parts = [
                self._attend(part, k, v, segments=None, bias=bias, start=span * length)
                for part, span in zip(q.split(length, dim=1), spans, strict=True)
            ]
            output = torch.cat(parts, dim=1)
        if self.output_norm:
            output = nn.functional.rms_norm(output, output.shape[3:], eps=NORM_EPS)
        return output

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        segments: tuple[Tensor, Tensor] | None,
        bias: Tensor | None,
        start: int,
    ) -> Tensor:
        return tiled_attention(
            q,
            k,
            v,
            segments=segments,
            bias=bias,
            start=start,
            causal=self.causal,
            form=self.form,
            backend=self.backend,
        )
