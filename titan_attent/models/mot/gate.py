"""The gate: from the hidden states of a sequence's first tokens to the expert that computes the sequence.

    logits = W mean over the first P tokens of x / rms(x)
    route = argmax (logits + noise)            probability = softmax(logits)[route]

The expert's output is multiplied by the probability, through which the gate gets its gradient (Fedus et al. 2021, arXiv
2101.03961; without the noise, which only explores, as in Chen et al. 2022, arXiv 2208.02813).

**Nothing leaks.** In a causal model the hidden states of the first P tokens depend on these tokens alone, in every
layer. The route therefore depends on tokens 0 .. P-1 of the window and on none after. The prediction at position t is
of token t + 1: at positions P-1 and later of tokens that no gate has seen; at positions before, of tokens that the
gates have seen, so these P-1 labels are masked (examples.py).

**Noise** is a hash of (seed, step, example, layer, expert), so it does not depend on the ranks or on earlier steps.

**Balance.** E sum_e f_e p_e, with p the probabilities of a sequence and f_e the share of the sequences that expert e
got: Fedus et al.'s, but f is a moving average over earlier steps and all ranks. So the loss is a mean over sequences,
the same for any split of a batch over ranks and microbatches, and no rank waits for others within a step.

Cost: per layer one product [B, D] x [D, E] and a mean over P tokens.

Shapes: B sequences, L tokens, D channels, E experts, N layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream, uniform


class Routing(NamedTuple):
    """The decision of one gate.

    Attributes:
        route: int64 [B], the expert of each sequence.
        probability: fp32 [B], the softmax of its expert, with a graph.
        probabilities: fp32 [B, E], with a graph.
    """

    route: Tensor
    probability: Tensor
    probabilities: Tensor


def route_keys(example_ids: Tensor, *, seed: int, step: int) -> Tensor:
    """The numbers of examples in a step, from which all of its noise is derived: int64 ids [B] -> int64 [B]."""
    return hash_ids(example_ids, derive_key(stream("mot/noise"), seed, step))


def exploration(keys: Tensor, *, layer: int, num_experts: int, scale: float) -> Tensor:
    """The noise of one gate, fp32 [B, E], even in [0, ``scale``).

    Args:
        keys: :func:`route_keys` of the sequences, int64 [B].
    """
    experts = torch.arange(num_experts, device=keys.device)
    return (uniform(keys[:, None] + experts, derive_key(layer)) * scale).float()


def decide(hidden: Tensor, weight: Tensor, *, prefix: int, noise: Tensor | None = None) -> Routing:
    """Route the sequences of a batch.

    Args:
        hidden: [B, L, D], the input of the block.
        weight: [E, D].
        prefix: P; all tokens of a shorter sequence decide.
        noise: [B, E], added to the logits for the decision alone; None for none.
    """
    first = hidden[:, :prefix]
    dtype = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        mean = F.rms_norm(first.to(dtype), first.shape[-1:]).mean(dim=1)
        logits = F.linear(mean, weight.to(dtype))
        probabilities = logits.softmax(dim=-1)
        route = (logits if noise is None else logits + noise).argmax(dim=-1)
        probability = probabilities.gather(1, route[:, None]).squeeze(1)
    return Routing(route, probability, probabilities)


def balance_loss(probabilities: Tensor, shares: Tensor) -> Tensor:
    """The balance loss of each sequence, the mean over the layers: [B], 1 for equal shares or equal probabilities.

    Args:
        probabilities: [N, B, E].
        shares: [N, E], the shares of the sequences that the experts of each layer got; no gradient.
    """
    return probabilities.shape[-1] * torch.einsum("nbe,ne->b", probabilities, shares) / len(shares)


def count_routes(routes: Tensor, amounts: Tensor, *, num_experts: int) -> Tensor:
    """Add up what each expert got, fp64 [N, E].

    Args:
        routes: int64 [N, B].
        amounts: [B], per sequence: 1, or its number of tokens.
    """
    chosen = routes[:, :, None] == torch.arange(num_experts, device=routes.device)
    return torch.einsum("nbe,b->ne", chosen.double(), amounts.double())
