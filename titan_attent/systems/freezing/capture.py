"""Capture of layer inputs and output gradients in one forward and one backward pass, to compute Gram matrices.

Inside a :class:`Capture`, each layer's own ``forward`` is wrapped, inside all hooks of parallelisms:

- For a Linear or an Embedding the input and the output are kept; the backward then computes the output's gradient.
- Experts get the tokens of several examples at once, sorted by expert. Here each example passes through them
  separately, with an alias of the weights whose gradient is the example's own. Once those of all examples of a layer
  exist, they are multiplied and dropped, so only one layer's gradients are in memory at a time.

``torch.autograd.grad`` computes exactly these gradients, so no parameter gets one, and none is accumulated or reduced.
Under tensor parallelism a rank has a shard of the inputs or of the outputs, and computes one summand of the Gram
matrix.

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
from titan_attent.systems.freezing.gram import at_least_fp32, bias_gram, cross_gram, embedding_gram, linear_gram
from titan_attent.systems.freezing.units import Unit

Forward = Callable[..., Any]


class LayerCall(NamedTuple):
    """One call of a layer: its input (token ids for an embedding), and its output, whose gradient is computed."""

    name: str
    layer: nn.Module
    inputs: Tensor
    output: Tensor


class Capture:
    """A context for a forward pass; afterwards :meth:`grams` runs the backward pass.

    Args:
        units: the modules to capture.
        num_examples: n, the examples of the batch.
        num_ranks: tensor parallel degree. Gram matrices that every rank computes in full are divided by it.
        num_heads: H, the number of attention heads; 0 to leave out the heads.

    Attributes:
        heads: unit -> fp32 or fp64 [H, n, n]: the Gram matrix of each head's rows of ``wq`` and columns of ``wo``. It
            excludes keys and values, which several heads may share. Filled by :meth:`grams`.
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
        self._row_examples: Tensor | None = None
        self._patched: list[nn.Module] = []

    def __enter__(self) -> "Capture":
        for unit in self.units:
            for name, layer in unit.layers.items():
                if is_experts(layer):
                    self._patch(layer, self._through_experts(unit.name, name, layer, layer.forward))
                elif isinstance(layer, nn.Linear | nn.Embedding):
                    self._patch(layer, self._capturing(unit.name, name, layer, layer.forward))
                else:
                    self._patch(layer, self._capturing_order(layer, layer.forward))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End the capture of layer calls, so that calls repeated by activation checkpointing are not captured."""
        for layer in self._patched:
            del layer.forward
        self._patched.clear()

    def _patch(self, layer: nn.Module, forward: Forward) -> None:
        layer.forward = forward
        self._patched.append(layer)

    # -- forward --------------------------------------------------------------------------------------------------

    def _capturing(self, unit: str, name: str, layer: nn.Module, forward: Forward) -> Forward:
        """Wrap the forward of a Linear or Embedding to keep its input and output."""

        def capturing(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = forward(inputs, *args, **kwargs)
            self._calls[unit].append(LayerCall(name, layer, inputs.detach(), output))
            return output

        return capturing

    def _capturing_order(self, layer: Any, forward: Forward) -> Forward:
        """Wrap the forward of torchtitan's TokenReorderer to keep the example of each row that the experts get next."""

        def capturing(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            tokens = result[1] // layer.top_k
            self._row_examples = tokens // (len(tokens) // layer.top_k // self.num_examples)
            return result

        return capturing

    def _through_experts(self, unit: str, name: str, layer: nn.Module, forward: Forward) -> Forward:
        """Replace the forward of torchtitan's grouped experts by one call per example.

        Its inputs are the rows [R, d], sorted by expert, and the number of rows of each expert.
        """

        def example_by_example(rows: Tensor, counts: Tensor) -> Tensor:
            assert self._row_examples is not None
            experts = torch.arange(len(counts), device=rows.device).repeat_interleave(counts.long())
            outputs = []
            del layer.forward  # so that functional_call uses the layer's own forward
            for i in range(self.num_examples):
                is_own = self._row_examples == i
                aliases = {key: weight.view_as(weight) for key, weight in layer.named_parameters()}
                for key, alias in aliases.items():
                    alias.register_hook(self._expert_gradient(unit, f"{name}.{key}", i))
                    self._aliases.append(alias)
                own_counts = torch.bincount(experts[is_own], minlength=len(counts)).to(counts.dtype)
                outputs.append(torch.func.functional_call(layer, aliases, (rows[is_own], own_counts)))
            layer.forward = example_by_example
            order = torch.argsort(self._row_examples, stable=True)
            return torch.cat(outputs)[torch.argsort(order)]

        return example_by_example

    def _expert_gradient(self, unit: str, key: str, example: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            gradients = self._gradients[unit, key]
            gradients[example] = at_least_fp32(gradient).flatten()
            if len(gradients) == self.num_examples:
                self._multiply_experts(unit, key)
            return gradient.new_zeros(()).expand_as(gradient)

        return hook

    def _multiply_experts(self, unit: str, key: str) -> None:
        gradients = self._gradients.pop((unit, key))
        gram = next(iter(gradients.values())).new_zeros(self.num_examples, self.num_examples)
        for i, first in gradients.items():
            for j, second in gradients.items():
                if j <= i:
                    gram[i, j] = gram[j, i] = first @ second
        self._expert_grams[unit].append(gram)

    # -- backward -------------------------------------------------------------------------------------------------

    def grams(self, scalar: Tensor) -> Tensor:
        """Differentiate ``scalar``, a sum of one number per example.

        Returns:
            fp32 or fp64 [units, n, n]: this rank's summand of each unit's Gram matrix. It covers the per-example
            gradients of the unit's matrices and biases, but not vectors without a matrix, such as scales of norms.
        """
        self.stop()
        calls = [(unit, call) for unit, unit_calls in self._calls.items() for call in unit_calls]
        targets = [call.output for _, call in calls] + self._aliases
        gradients = torch.autograd.grad(scalar, targets, allow_unused=True)
        for unit, key in list(self._gradients):
            self._multiply_experts(unit, key)
        grams = {unit.name: scalar.new_zeros(self.num_examples, self.num_examples) for unit in self.units}
        grams = {name: at_least_fp32(gram.detach()) for name, gram in grams.items()}
        embedded: dict[str, tuple[Tensor, Tensor]] = {}
        for (unit, call), gradient in zip(calls, gradients, strict=False):
            if gradient is None:
                continue
            a, g, is_sharded = self._local(call, gradient)
            if isinstance(call.layer, nn.Embedding):
                embedded[unit] = a, g
                gram = embedding_gram(a, g)
            else:
                gram = linear_gram(a, g)
                if self.num_heads and call.name.endswith(("attention.wq", "attention.wo")):
                    head_grams = self._head_grams(a, g, columns_of=g if call.name.endswith("wq") else a)
                    self.heads[unit] = self.heads.get(unit, 0) + head_grams
                if unit in embedded:  # embedding and output share one matrix
                    cross = cross_gram(*embedded[unit], a, g)
                    gram += cross + cross.T
                if call.layer.bias is not None:
                    gram += bias_gram(g)
            grams[unit] += gram if is_sharded else gram / self.num_ranks
        for unit, expert_grams in self._expert_grams.items():
            grams[unit] += torch.stack(expert_grams).sum(dim=0)
        self._calls.clear()
        self._aliases.clear()
        return torch.stack([grams[unit.name] for unit in self.units])

    def _head_grams(self, a: Tensor, g: Tensor, *, columns_of: Tensor) -> Tensor:
        """The Gram matrix of each head, [H, n, n]. ``columns_of`` is ``a`` or ``g``, whose columns the heads split."""
        chunks = columns_of.chunk(self.num_heads, dim=-1)
        pairs = [(a, chunk) if columns_of is g else (chunk, g) for chunk in chunks]
        return torch.stack([linear_gram(*pair) for pair in pairs])

    def _local(self, call: LayerCall, gradient: Tensor) -> tuple[Tensor, Tensor, bool]:
        """(input [n, T, p] or ids [n, T], output gradient [n, T, q], whether either of them is sharded over ranks)."""
        a, is_sharded = call.inputs, False
        if isinstance(call.output, DTensor):
            assert isinstance(gradient, DTensor)
            # Partial: a sum over ranks that is still pending. Each of its summands gets the whole gradient.
            placements = [Replicate() if placement.is_partial() else placement for placement in call.output.placements]
            is_sharded = any(placement.is_shard() for placement in placements)
            gradient = gradient.redistribute(placements=placements).to_local()
        if isinstance(a, DTensor):
            is_sharded = is_sharded or any(placement.is_shard() for placement in a.placements)
            a = a.to_local()
        n = self.num_examples
        tokens = a.reshape(n, -1) if isinstance(call.layer, nn.Embedding) else a.reshape(n, -1, a.shape[-1])
        return tokens, gradient.reshape(n, -1, gradient.shape[-1]), is_sharded
