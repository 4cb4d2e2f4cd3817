"""Blocks of a model, cut out of the graph: the hooks that give each block its own graph, and the passes over it.

Each block has two hooks, around FSDP2's hooks and outside the code that torch.compile traces. One detaches the block's
input, the other its output. The head's backward then ends at the last block's detached output.

FSDP2 is used by public calls only. To FSDP2 each pass over a block's graph is a backward. Its hooks gather the block's
weights. At the end of the call, or of a pass that reached the block's input, they reduce the gradients that exist and
free the weights. Hence:

- The weights stay gathered between the passes over one block, so there are no more gathers than in backpropagation.
- A pass for the input gradient alone has nothing to reduce.
- Only the last pass of a microbatch is announced as the last backward, so prefetched weights are kept until then.

Frozen modules (``[freezing]``): as in backpropagation, no pass runs below the lowest block with trainable weights, and
that block's pass is the last of the microbatch. Sums measured below it repeat the values from above.

Tied embeddings are in one FSDP2 group with the head, and this group has no hook at the embeddings' output. So their
backward runs in one call with that of the first block's weights, whose hook handles the group; until then the group is
not reduced. This call also computes an input gradient of the first block, which is not used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle


class BlockLink:
    """The :class:`titan_attent.systems.highway.sweep.Link` of a module.

    Args:
        block: the module.
        x: its detached input; requires gradients if input gradients will be computed.
        y: its output, with the graph from x.
        learns_below: whether a weight below the block is trainable; otherwise the input gradient is not needed.
        on_last: called before the pass over the block if it is the last of the microbatch, as nothing below learns.
    """

    def __init__(self, block: nn.Module, x: Tensor, y: Tensor, *, learns_below: bool, on_last: Callable[[], None]):
        self.block, self.x, self.y, self.learns_below, self.on_last = block, x, y, learns_below, on_last
        self._is_gathered = False

    def weights(self) -> list[nn.Parameter]:
        """The trainable weights of the block."""
        return [weight for weight in self.block.parameters() if weight.requires_grad]

    def input_gradient(self, w: Tensor) -> Tensor:
        """w J; if nothing below learns, w itself, without a pass."""
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
        # The gathered weights are the leaves of the graph only after an input gradient; before, FSDP2 has others.
        leaves = weights if self._is_gathered else None
        torch.autograd.backward(self.y, w.to(self.y.dtype), inputs=leaves)
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
    """A link whose weight gradients are computed later, by :meth:`backward_with`."""

    def weight_gradients(self, w: Tensor) -> None:
        self.held = w

    def both(self, w: Tensor) -> Tensor:
        self.held = w
        return self.input_gradient(w)

    def backward_with(self, bottom: Tensor, below: Tensor) -> None:
        """Run the backward of the block's weights and of the embeddings below ``bottom`` in one call."""
        self._keep_gathered(False)
        pairs = [(y, w.to(y.dtype)) for y, w in ((self.y, self.held), (bottom, below)) if y.requires_grad]
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)
        self.x.grad = None


class Cuts:
    """The hooks on the blocks of a model, and the links that they made in the forward pass of a microbatch.

    Args:
        blocks: the blocks in the order of the forward pass. Each takes the hidden state as its first argument and
            returns only the hidden state.
        root: the model; if it is sharded, the root of FSDP2.
        tied: the embeddings, if the head shares their weights and FSDP2 has both in one group.
        needs_input_gradients: returns whether the blocks' inputs will need gradients, or None to leave this pass uncut.
            Called at the first block, in training mode with gradients enabled.
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
        self._learns = False  # whether a module that the forward pass has passed is trainable
        self._inputs: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        for i, block in enumerate(self.blocks):
            # The first runs before FSDP2's pre-hook, which hooks the input; the second runs after FSDP2's hook.
            self._handles.append(block.register_forward_pre_hook(self._before(i), prepend=True))
            self._handles.append(block.register_forward_hook(self._after(i)))

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

    def _after(self, i: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def cut(block: nn.Module, args: tuple[Any, ...], y: Any) -> Any:
            if self._needed is None:
                return None
            link_class = HeldBlockLink if i == 0 and self.tied is not None else BlockLink
            link = link_class(block, self._inputs[i], y, learns_below=self._learns, on_last=lambda: self.set_last(True))
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
        """Announce whether the next backward is the last of its microbatch.

        The head's backward is always the last if nothing below the head learns.
        """
        is_last = is_last or (self.top is not None and not self._learns)
        if self.root is not None:
            self.root.set_is_last_backward(is_last)
        if self.tied is not None:
            self.tied.set_requires_gradient_sync(is_last, recurse=False)

    def gradient(self) -> Tensor | None:
        """The gradient of the loss at the last block's output, after the head's backward; None if nothing was cut."""
        return None if self.top is None else self.top.grad

    def send_below(self, w: Tensor) -> None:
        """Run the backward below the first block, from the gradient ``w`` at its input."""
        assert self.bottom is not None
        self.set_last(True)
        if isinstance(first := self.links[0], HeldBlockLink):
            first.backward_with(self.bottom, w)
        elif self.bottom.requires_grad:
            torch.autograd.backward(self.bottom, w.to(self.bottom.dtype))

    def clear(self) -> None:
        """Drop the links of the microbatch."""
        self.links, self._inputs = [], []
        self.bottom = self.top = self._needed = None
        self._learns = False

    def remove(self) -> None:
        self.clear()
        for handle in self._handles:
            handle.remove()


def tied_embeddings(model: nn.Module) -> FSDPModule | None:
    """The embeddings, if they share their weights with the head and FSDP2 has both in one group; otherwise None."""
    embeddings: Any = getattr(model, "tok_embeddings", None)
    head: Any = getattr(model, "output", None)
    if not isinstance(embeddings, FSDPModule) or head is None:
        return None
    shared = set(map(id, nn.Module.parameters(embeddings))) & set(map(id, head.parameters()))  # type: ignore[arg-type]
    return embeddings if shared else None
