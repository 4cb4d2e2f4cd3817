"""The data model of mixtures of transformers, and the one-layer model that learns it.

**Data** (inferred from the paper's reviews and from Chen et al. 2022, arXiv 2208.02813; the paper's formulas are not
public). 2 N orthonormal vectors in R^d: of each class n a center c_n and a signal v_n. A sequence of class n with the
answer y = +-1 has L tokens in random order: c_n, y v_n, a distractor e v_m with another class m and a random sign e,
and Gaussian noise of norm about ``noise`` each. The answer is the sign of the signal of the own class: whoever does not
know the class cannot tell it from the distractor. ``plain`` data have one signal for all classes and noise in place of
the distractor: one expert suffices.

**Model** (its parts are told of by the reviews: one layer, merged key-query matrices, one neuron per expert; that the
neuron is linear, the sum over the queries and the squared loss are inferred):

    f_e(X) = w_e . sum over l of X softmax(X^T A_e x_l)        output = p f_e(X), e the route and p its probability

A begins at 0, the mean of all tokens, w and the gate at random. The gate is the package's own (models/mot/gate.py): top
1, noise in the first stage, balance loss.

Cost of a run: 1 to 2 s of a core for 600 steps of 64 fresh sequences.

Shapes: B sequences, L tokens, d channels, E experts, N classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from titan_attent.foundations.counter_rng import derive_key, hash_ids, stream
from titan_attent.models.mot.gate import Routing, balance_loss, decide, exploration, route_keys

MEMORY = 0.9
"""Weight of earlier steps in the moving average of the experts' shares, as in titan/models/routing.py."""


@dataclass(frozen=True)
class Data:
    """A distribution of sequences.

    Attributes:
        classes: N.
        tokens: L, at least 3.
        dim: d, at least 2 N.
        noise: the norm of a noise token.
        plain: one signal for all classes, and no distractor.
    """

    classes: int = 4
    tokens: int = 6
    dim: int = 16
    noise: float = 0.5
    plain: bool = False

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(X fp32 [count, L, d], y fp32 [count] of +-1, class int64 [count])."""
        basis = torch.linalg.qr(torch.randn(self.dim, self.dim, generator=torch.Generator().manual_seed(0)))[0]
        centers, signals = basis[: self.classes], basis[self.classes : 2 * self.classes]
        n = torch.randint(self.classes, (count,), generator=generator)
        other = (n + torch.randint(1, self.classes, (count,), generator=generator)) % self.classes
        y, sign = (torch.randint(2, (count,), generator=generator) * 2.0 - 1 for _ in range(2))
        x = torch.randn(count, self.tokens, self.dim, generator=generator) * (self.noise / self.dim**0.5)
        x[:, 0] = centers[n]
        x[:, 1] = y[:, None] * signals[torch.zeros_like(n) if self.plain else n]
        if not self.plain:
            x[:, 2] = sign[:, None] * signals[other]
        order = torch.rand(count, self.tokens, generator=generator).argsort(dim=1)
        return x.gather(1, order[:, :, None].expand_as(x)), y, n


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        stages: what is trained in each third of the steps: "attention", "feed_forward" or "both".
        experts: E.
        gate: "learned"; "frozen" at its initial weights; "random", a route per sequence and step; "class", the route is
            the number of the class; "all" for the sum of all experts: multi-head attention with a neuron per head, and
            no gate.
        attention: "own" of each expert, "shared" by all, or "none": the mean of the tokens.
    """

    stages: tuple[str, str, str] = ("feed_forward", "attention", "feed_forward")
    experts: int = 8
    gate: str = "learned"
    attention: str = "own"


class Look(NamedTuple):
    """What a run's test sequences say, without noise.

    Attributes:
        step: steps done.
        loss: mean squared error.
        largest_share: of the sequences, of the expert that gets most of them.
        purity: share of the sequences that go to the expert that most of their class go to.
        separation: number of experts that most sequences of at least one class go to.
    """

    step: int
    loss: float
    largest_share: float
    purity: float
    separation: int


class Model:
    """The weights of an arm: attention [E or 1, d, d], neurons [E, d], gate [E, d]."""

    def __init__(self, arm: Arm, data: Data, seed: int):
        generator = torch.Generator().manual_seed(derive_key(seed, stream("benchmarks/mot")) >> 1)
        heads = 1 if arm.attention == "shared" else arm.experts
        self.arm, self.seed = arm, seed
        self.attention = torch.zeros(heads, data.dim, data.dim)
        self.neurons = torch.randn(arm.experts, data.dim, generator=generator) * 0.1 / data.dim**0.5
        self.gate = torch.randn(arm.experts, data.dim, generator=generator) * 0.02

    def parameters(self) -> dict[str, Tensor]:
        return {"attention": self.attention, "feed_forward": self.neurons, "gate": self.gate}

    def route(self, x: Tensor, n: Tensor, *, step: int, first: int, noise: float) -> Routing:
        """The routing of B sequences of classes n, the ``first``, ``first`` + 1, ... of the run, in a step."""
        even = torch.full((len(x), self.arm.experts), 1 / self.arm.experts)
        if self.arm.gate == "class":
            return Routing(n, torch.ones(len(x)), even)
        keys = route_keys(torch.arange(first, first + len(x)), seed=self.seed, step=step)
        if self.arm.gate == "random":
            route = hash_ids(keys, derive_key(stream("benchmarks/mot/random"))).remainder(self.arm.experts)
            return Routing(route, torch.ones(len(x)), even)
        extra = exploration(keys, layer=0, num_experts=self.arm.experts, scale=noise) if noise else None
        return decide(x, self.gate, prefix=x.shape[1], noise=extra)

    def experts_of(self, x: Tensor, route: Tensor) -> Tensor:
        """f of the expert of each sequence, [B]."""
        if self.arm.attention == "none":
            pooled = x.sum(dim=1)
        else:
            matrices = self.attention[torch.zeros_like(route) if len(self.attention) == 1 else route]
            scores = torch.bmm(torch.bmm(x, matrices), x.transpose(1, 2))  # [B, key, query]
            pooled = torch.bmm(scores.softmax(dim=1).sum(dim=2)[:, None], x).squeeze(1)
        return (pooled * self.neurons[route]).sum(dim=1)

    def __call__(
        self, x: Tensor, n: Tensor, *, step: int = 0, first: int = 0, noise: float = 0.0
    ) -> tuple[Tensor, Routing]:
        """(output [B], routing)."""
        if self.arm.gate == "all":
            heads = [self.experts_of(x, torch.full((len(x),), e)) for e in range(self.arm.experts)]
            none = torch.zeros(len(x), dtype=torch.int64)
            return torch.stack(heads).sum(dim=0), Routing(none, none, torch.ones(len(x), 1))
        routing = self.route(x, n, step=step, first=first, noise=noise)
        return routing.probability * self.experts_of(x, routing.route), routing


@torch.no_grad()
def look(model: Model, data: Data, step: int, test: tuple[Tensor, Tensor, Tensor]) -> Look:
    x, y, n = test
    output, routing = model(x, n, step=-1)
    table = torch.zeros(data.classes, model.arm.experts)
    table.index_put_((n, routing.route), torch.ones(len(n)), accumulate=True)
    return Look(
        step,
        (output - y).square().mean().item(),
        (table.sum(dim=0).max() / len(n)).item(),
        (table.max(dim=1).values.sum() / len(n)).item(),
        len(set(table.argmax(dim=1).tolist())),
    )


def train(
    arm: Arm, data: Data, *, seed: int, steps: int, rate: float, batch: int = 64, every: int = 30, balance: float = 0.01
) -> Iterator[Look]:
    """Train by Adam on fresh sequences; a look every ``every`` steps and at the start. What is frozen keeps no
    gradient, so Adam does not move it.

    The learning rate is halved ten times over the last stage, so that the end shows what is left beside its noise.
    """
    generator = torch.Generator().manual_seed(seed)
    test = data.draw(1024, torch.Generator().manual_seed(10_000 + seed))
    model = Model(arm, data, seed)
    named = model.parameters()
    optimizer = torch.optim.Adam(named.values(), lr=rate, fused=True)
    shares = torch.full((1, arm.experts), 1 / arm.experts)
    yield look(model, data, 0, test)
    for step in range(1, steps + 1):
        stage = min(2, 3 * (step - 1) // steps)
        trained = {"both": ("attention", "feed_forward")}.get(arm.stages[stage], (arm.stages[stage],))
        for name, weights in named.items():
            weights.requires_grad_(name in trained or (name == "gate" and arm.gate == "learned"))
            weights.grad = None
        if (step - 1) % every == 0:  # many at once, which is quicker
            drawn = data.draw(batch * every, generator)
        here = slice((step - 1) % every * batch, ((step - 1) % every + 1) * batch)
        x, y, n = (column[here] for column in drawn)
        output, routing = model(x, n, step=step, first=step * batch, noise=1.0 if stage == 0 else 0.0)
        loss = (output - y).square().mean()
        if arm.gate == "learned":
            loss = loss + balance * balance_loss(routing.probabilities[None], shares).mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate * 0.5 ** (10 * max(0.0, 3 * step / steps - 2))
        optimizer.step()
        got = torch.bincount(routing.route, minlength=arm.experts) / len(x)
        shares = MEMORY * shares + (1 - MEMORY) * got
        if step % every == 0:
            yield look(model, data, step, test)
