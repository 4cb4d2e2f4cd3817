"""What one forward pass and one backward pass leave of every layer of a module: enough for its Gram matrix.

While a :class:`Capture` is entered, a layer's own ``forward`` is wrapped, inside all hooks of parallelisms:

- of a Linear and an Embedding the input is kept, and the output is asked for its gradient;
- experts see the tokens of several examples at once, sorted by expert: each example goes through them by itself, with
  an alias of the weights, whose gradient is then the example's. It is multiplied and dropped as soon as those of all
  examples of the layer have come, so that one layer's are there at a time.

The gradients are asked of autograd by name, so that no parameter gets one, nothing is accumulated and nothing reduced.
Under tensor parallelism a rank has a part of the inputs or of the outputs, and its Gram matrix is one summand.

Cost: memory of the inputs and output gradients of all layers for the probe examples, as without activation
checkpointing.

Shapes: n probe examples, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from titan_attent.foundations.flops import is_experts
from titan_attent.systems.freezing.gram import bias_gram, cross_gram, embedding_gram, linear_gram, wide
from titan_attent.systems.freezing.units import Unit

Forward = Callable[..., Any]


class LayerCall(NamedTuple):
    """Of a layer: its input (token ids of an embedding), and the output, whose gradient is wanted."""

    name: str
    layer: nn.Module
    inputs: Tensor
    output: Tensor


class Capture:
    """Context around a forward pass; then :meth:`grams` makes the backward pass.

    Args:
        units: the modules to watch.
        num_examples: n, of the batch.
        num_ranks: of tensor parallelism, by which what each rank has whole is divided.
        num_heads: H, of attention; 0 to leave out the heads.

    Attributes:
        heads: unit -> fp32 or fp64 [H, n, n]: the Gram matrix of each head's rows of ``wq`` and columns of ``wo``.
            Keys and values, which several heads may share, are not in it. Filled by :meth:`grams`.
    """

    def __init__(self, units: Sequence[Unit], *, num_examples: int, num_ranks: int = 1, num_heads: int = 0):
        self.units = units
        self.num_examples = num_examples
        self.num_ranks = num_ranks
        self.num_heads = num_heads
        self.heads: dict[str, Tensor] = {}
        self._calls: dict[str, list[LayerCall]] = defaultdict(list)
        self._aliases: list[Tensor] = []
        self._gradients: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
        self._expert_grams: dict[str, list[Tensor]] = defaultdict(list)
        self._examples_of_rows: Tensor | None = None
        self._patched: list[nn.Module] = []

    def __enter__(self) -> "Capture":
        for unit in self.units:
            for name, layer in unit.layers.items():
                if is_experts(layer):
                    self._patch(layer, self._through_experts(unit.name, name, layer, layer.forward))
                elif isinstance(layer, nn.Linear | nn.Embedding):
                    self._patch(layer, self._watched(unit.name, name, layer, layer.forward))
                else:
                    self._patch(layer, self._sorted(layer, layer.forward))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """The forward pass is over: what checkpointing runs again is not watched."""
        for layer in self._patched:
            del layer.forward
        self._patched.clear()

    def _patch(self, layer: nn.Module, forward: Forward) -> None:
        layer.forward = forward
        self._patched.append(layer)

    # -- forward --------------------------------------------------------------------------------------------------

    def _watched(self, unit: str, name: str, layer: nn.Module, forward: Forward) -> Forward:
        def watched(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = forward(inputs, *args, **kwargs)
            self._calls[unit].append(LayerCall(name, layer, inputs.detach(), output))
            return output

        return watched

    def _sorted(self, layer: Any, forward: Forward) -> Forward:
        """Of torchtitan's TokenReorderer: which example each of the rows is of that the experts get next."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            tokens = result[1] // layer.top_k
            self._examples_of_rows = tokens // (len(tokens) // layer.top_k // self.num_examples)
            return result

        return watched

    def _through_experts(self, unit: str, name: str, layer: nn.Module, forward: Forward) -> Forward:
        """Of torchtitan's grouped experts: rows [R, d] sorted by expert, of which so many belong to each expert."""

        def example_by_example(rows: Tensor, counts: Tensor) -> Tensor:
            assert self._examples_of_rows is not None
            experts = torch.arange(len(counts), device=rows.device).repeat_interleave(counts.long())
            outputs = []
            del layer.forward  # the layer's own is called
            for i in range(self.num_examples):
                mine = self._examples_of_rows == i
                aliases = {key: weight.view_as(weight) for key, weight in layer.named_parameters()}
                for key, alias in aliases.items():
                    alias.register_hook(self._expert_gradient(unit, f"{name}.{key}", i))
                    self._aliases.append(alias)
                of_experts = torch.bincount(experts[mine], minlength=len(counts)).to(counts.dtype)
                outputs.append(torch.func.functional_call(layer, aliases, (rows[mine], of_experts)))
            layer.forward = example_by_example
            order = torch.argsort(self._examples_of_rows, stable=True)
            return torch.cat(outputs)[torch.argsort(order)]

        return example_by_example

    def _expert_gradient(self, unit: str, key: str, example: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            gradients = self._gradients[unit, key]
            gradients[example] = wide(gradient).flatten()
            if len(gradients) == self.num_examples:
                self._multiply_experts(unit, key)
            return gradient.new_zeros(()).expand_as(gradient)

        return hook

    def _multiply_experts(self, unit: str, key: str) -> None:
        gradients = self._gradients.pop((unit, key))
        gram = next(iter(gradients.values())).new_zeros(self.num_examples, self.num_examples)
        for i, one in gradients.items():
            for j, other in gradients.items():
                if j <= i:
                    gram[i, j] = gram[j, i] = one @ other
        self._expert_grams[unit].append(gram)

    # -- backward -------------------------------------------------------------------------------------------------

    def grams(self, scalar: Tensor) -> Tensor:
        """Differentiate ``scalar``, the sum over the examples of what is asked of each.

        Returns:
            fp32 or fp64 [units, n, n]: this rank's summand of the Gram matrix of each unit's per-example gradients of
            its matrices and biases. Vectors without a matrix, such as scales of norms, are not in it.
        """
        self.stop()
        seen = [(unit, item) for unit, items in self._calls.items() for item in items]
        wanted = [item.output for _, item in seen] + self._aliases
        gradients = torch.autograd.grad(scalar, wanted, allow_unused=True)
        for unit, key in list(self._gradients):
            self._multiply_experts(unit, key)
        grams = {unit.name: scalar.new_zeros(self.num_examples, self.num_examples) for unit in self.units}
        grams = {name: wide(gram.detach()) for name, gram in grams.items()}
        embedded: dict[str, tuple[Tensor, Tensor]] = {}
        for (unit, item), gradient in zip(seen, gradients, strict=False):
            if gradient is None:
                continue
            a, g, is_part = self._local(item, gradient)
            if isinstance(item.layer, nn.Embedding):
                embedded[unit] = a, g
                gram = embedding_gram(a, g)
            else:
                gram = linear_gram(a, g)
                if self.num_heads and item.name.endswith(("attention.wq", "attention.wo")):
                    own = self._head_grams(a, g, columns_of=g if item.name.endswith("wq") else a)
                    self.heads[unit] = self.heads.get(unit, 0) + own
                if unit in embedded:  # one matrix for both
                    mixed = cross_gram(*embedded[unit], a, g)
                    gram += mixed + mixed.T
                if item.layer.bias is not None:
                    gram += bias_gram(g)
            grams[unit] += gram if is_part else gram / self.num_ranks
        for unit, parts in self._expert_grams.items():
            grams[unit] += torch.stack(parts).sum(dim=0)
        self._calls.clear()
        self._aliases.clear()
        return torch.stack([grams[unit.name] for unit in self.units])

    def _head_grams(self, a: Tensor, g: Tensor, *, columns_of: Tensor) -> Tensor:
        """[H, n, n]: each head has as many columns of one of the two."""
        parts = columns_of.chunk(self.num_heads, dim=-1)
        pairs = [(a, part) if columns_of is g else (part, g) for part in parts]
        return torch.stack([linear_gram(*pair) for pair in pairs])

    def _local(self, item: LayerCall, gradient: Tensor) -> tuple[Tensor, Tensor, bool]:
        """(input [n, T, p] or ids [n, T], output gradient [n, T, q], whether the ranks hold parts of either)."""
        a, is_part = item.inputs, False
        if isinstance(item.output, DTensor):
            assert isinstance(gradient, DTensor)
            # A sum over ranks that is still to be made hands each of its summands the whole gradient.
            wanted = [Replicate() if place.is_partial() else place for place in item.output.placements]
            is_part = any(place.is_shard() for place in wanted)
            gradient = gradient.redistribute(placements=wanted).to_local()
        if isinstance(a, DTensor):
            is_part = is_part or any(place.is_shard() for place in a.placements)
            a = a.to_local()
        n = self.num_examples
        tokens = a.reshape(n, -1) if isinstance(item.layer, nn.Embedding) else a.reshape(n, -1, a.shape[-1])
        return tokens, gradient.reshape(n, -1, gradient.shape[-1]), is_part
