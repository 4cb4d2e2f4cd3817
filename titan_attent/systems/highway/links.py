"""Blocks of a model, cut out of the graph: hooks that give each a graph of its own, and the passes over it.

Two hooks a block, around FSDP2's own and outside of what torch.compile sees: before the block its input is detached,
behind it its output. What the head then differentiates with respect to is the last block's detached output.

FSDP2, by public calls only. Each pass over a block's graph is a backward to FSDP2: its hooks gather the block's
weights, and at the end of a pass that reached the block's input or of the whole call they reduce what gradients there
are and free the weights. So the weights are kept between the passes over one block (no gather more than
backpropagation's), a pass for the input alone finds nothing to reduce, and only the last pass of a microbatch is
announced as the last one, which keeps what was gathered ahead.

Modules that a run has frozen (``[freezing]``): below the lowest block in which something learns no pass is made, as by
backpropagation, and that block's own is the last of the microbatch. What is watched there repeats what was seen above.

Embeddings that the head shares stand in one FSDP2 group with it, which has no hook at the embeddings' output. So their
backward is one call with the weights' of the first block, whose hook sees to the group; until then it is not reduced.
That call computes an input gradient of the first block for nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle


class BlockLink:
    """A :class:`titan_attent.systems.highway.sweep.Link` of a module.

    Args:
        block: the module.
        x: its detached input; requires gradients if input gradients will be asked for.
        y: its output, with the graph from x.
        learns_below: whether something below the block learns; without it its input gradient is of no use.
        on_last: called before the last pass, where nothing below learns.
    """

    def __init__(self, block: nn.Module, x: Tensor, y: Tensor, *, learns_below: bool, on_last: Callable[[], None]):
        self.block, self.x, self.y, self.learns_below, self.on_last = block, x, y, learns_below, on_last
        self._is_gathered = False

    def weights(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [weight for weight in self.block.parameters() if weight.requires_grad]

    def input_gradient(self, w: Tensor) -> Tensor:
        """w itself, without a pass, where nothing below learns."""
        if not self.learns_below:
            return w
        self._keep_gathered(True)
        self._is_gathered = True
        (gradient,) = torch.autograd.grad(self.y, self.x, w.to(self.y.dtype), retain_graph=True)
        return gradient.to(w.dtype)

    def weight_gradients(self, w: Tensor) -> None:
        self._keep_gathered(False)
        weights = self.weights()
        if not (weights and self.y.requires_grad):
            return
        if not self.learns_below:
            self.on_last()
        # After an input gradient these are the weights that the graph knows; before it FSDP2 has others there.
        known = weights if self._is_gathered else None
        torch.autograd.backward(self.y, w.to(self.y.dtype), inputs=known)
        self.x.grad = None

    def both(self, w: Tensor) -> Tensor:
        if not self.learns_below:
            self.weight_gradients(w)
            return w
        self._keep_gathered(False)
        torch.autograd.backward(self.y, w.to(self.y.dtype))
        gradient, self.x.grad = self.x.grad, None
        assert gradient is not None
        return gradient.to(w.dtype)

    def _keep_gathered(self, keep: bool) -> None:
        if isinstance(self.block, FSDPModule):
            self.block.set_reshard_after_backward(not keep)


class HeldBlockLink(BlockLink):
    """Its weights' gradients wait for :meth:`backward_with`."""

    def weight_gradients(self, w: Tensor) -> None:
        self.held = w

    def both(self, w: Tensor) -> Tensor:
        self.held = w
        return self.input_gradient(w)

    def backward_with(self, bottom: Tensor, below: Tensor) -> None:
        """One call for the block's weights and for what is below ``bottom``."""
        self._keep_gathered(False)
        pairs = [(y, w.to(y.dtype)) for y, w in ((self.y, self.held), (bottom, below)) if y.requires_grad]
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)
        self.x.grad = None


class Cuts:
    """The hooks on the blocks of a model, and what they saw in the forward pass of a microbatch.

    Args:
        blocks: in the order of the forward pass; each takes the hidden state first and returns it alone.
        root: the model; the root of FSDP2, where it is sharded.
        tied: the embeddings, if the head shares their weights and FSDP2 has both in one group.
        needs_input_gradients: asked at the first block, while gradients are on and it is in training mode: whether the
            blocks' inputs will need gradients; None to leave the graph of this pass whole.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        root: nn.Module,
        tied: FSDPModule | None = None,
        needs_input_gradients: Callable[[], bool | None],
    ):
        self.blocks, self.needs_input_gradients = list(blocks), needs_input_gradients
        self.root, self.tied = root if isinstance(root, FSDPModule) else None, tied
        self.links: list[BlockLink] = []
        self.bottom: Tensor | None = None
        self.top: Tensor | None = None
        self._needed: bool | None = None
        self._learns = False  # of what the forward pass has come through
        self._inputs: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        for i, block in enumerate(self.blocks):
            # Before FSDP2's own, which registers what it has to do at the input; and behind FSDP2's own.
            self._handles.append(block.register_forward_pre_hook(self._before(i), prepend=True))
            self._handles.append(block.register_forward_hook(self._behind(i)))

    def _before(self, i: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def cut(block: nn.Module, args: tuple[Any, ...]) -> Any:
            if i == 0:
                self.clear()
                if torch.is_grad_enabled() and block.training:
                    self._needed = self.needs_input_gradients()
                    self.bottom = args[0]
                    self._learns = args[0].requires_grad
            if self._needed is None:
                return None
            x = args[0].detach().requires_grad_(self._needed and self._learns)
            self._inputs.append(x)
            return (x, *args[1:])

        return cut

    def _behind(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def cut(block: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            if self._needed is None:
                return None
            kind = HeldBlockLink if i == 0 and self.tied is not None else BlockLink
            link = kind(block, self._inputs[i], y, learns_below=self._learns, on_last=lambda: self.set_last(True))
            self.links.append(link)
            self._learns = self._learns or (y.requires_grad and bool(link.weights()))
            if i < len(self.blocks) - 1:
                return y.detach()
            self.top = y.detach().requires_grad_()
            if not self._learns:
                self.set_last(True)
            return self.top

        return cut

    def set_last(self, is_last: bool) -> None:
        """Whether the next backward is the last of its microbatch; the head's is where nothing below it learns."""
        is_last = is_last or (self.top is not None and not self._learns)
        if self.root is not None:
            self.root.set_is_last_backward(is_last)
        if self.tied is not None:
            self.tied.set_requires_gradient_sync(is_last, recurse=False)

    def gradient(self) -> Tensor | None:
        """That of the loss at the last block's output, after the head's backward."""
        return None if self.top is None else self.top.grad

    def send_below(self, w: Tensor) -> None:
        """Go on below the first block with this gradient at its input."""
        assert self.bottom is not None
        self.set_last(True)
        if isinstance(first := self.links[0], HeldBlockLink):
            first.backward_with(self.bottom, w)
        elif self.bottom.requires_grad:
            torch.autograd.backward(self.bottom, w.to(self.bottom.dtype))

    def clear(self) -> None:
        """Forget the microbatch."""
        self.links, self._inputs = [], []
        self.bottom = self.top = self._needed = None
        self._learns = False

    def remove(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()


def tied_embeddings(model: nn.Module) -> FSDPModule | None:
    """The embeddings, if FSDP2 shards them in one group with a head that has the same weights."""
    embeddings: Any = getattr(model, "tok_embeddings", None)
    head: Any = getattr(model, "output", None)
    if not isinstance(embeddings, FSDPModule) or head is None:
        return None
    shared = set(map(id, nn.Module.parameters(embeddings))) & set(map(id, head.parameters()))  # type: ignore[arg-type]
    return embeddings if shared else None
