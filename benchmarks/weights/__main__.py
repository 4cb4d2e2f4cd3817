"""The bias that remains with the weights of a soft draw, with and without their ceiling.

    python -m benchmarks.weights [--examples 2000] [--draws 4000] [--ratio 0.3]

A fixed vector x represents the contributions of the examples to a gradient. Soft draws select examples with a large
loss more often, and x is correlated with the loss, so the plain mean over a draw is biased. The table is over many
keyed draws by the product's own functions. It has the mean of the weighted mean sum(w x) / sum(w), its bias against the
mean of all examples, and its standard error. Without a ceiling, the remaining bias is the O(1/k) of a ratio of two
sums; a ceiling adds the bias of clipping.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from titan_attent.data.plan.order import Pool
from titan_attent.foundations.sharding import ExampleSharding
from titan_attent.job_config import TeacherConfig
from titan_attent.systems.teaching.candidates import Candidates
from titan_attent.systems.teaching.statistics import Scores
from titan_attent.systems.teaching.strategies import choose

CEILINGS = (1.0, 2.0, 4.0, 8.0, 1e9)
"""1 gives equal weights: the plain mean."""


def estimates(
    scores: np.ndarray, x: np.ndarray, *, k: int, num_draws: int, max_weight: float, floor: float
) -> np.ndarray:
    """float64 [num_draws]: the weighted mean of ``x`` in each draw."""
    size = len(scores)
    sharding = ExampleSharding(size)
    candidates = Candidates(Pool.whole(size), owners=sharding, sharding=sharding, device=torch.device("cpu"))
    config = TeacherConfig(max_weight=max_weight, min_inclusion_probability=floor)
    losses, results = torch.from_numpy(scores.astype(np.float32)), []
    for draw in range(num_draws):
        sharded = Scores(losses, sharding=sharding)
        weights, _ = choose(sharded, k=k, config=config, seed=(0, draw, 0), candidates=candidates, at_least=1)
        w = weights.double().numpy()
        results.append((w @ x) / w.sum())
    return np.array(results)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights", description="The bias that remains with the weights of a soft draw."
    )
    parser.add_argument("--examples", type=int, default=2000, help="examples drawn from")
    parser.add_argument("--draws", type=int, default=4000, help="number of draws")
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the examples per draw")
    args = parser.parse_args(argv)
    generator = np.random.default_rng(0)
    scores = generator.normal(3.0, 0.8, args.examples)  # nats per token
    x = scores + generator.normal(0.0, 0.5, args.examples)
    k = int(args.ratio * args.examples)
    print(f"N = {args.examples}, k = {k}, {args.draws} draws, mean of all {x.mean():.4f}\n")
    print("| floor | max_weight | mean | bias | standard error | share of the plain mean's bias |")
    print("|---|---|---|---|---|---|")
    for floor in (0.0, 0.05):
        plain = 0.0
        for ceiling in CEILINGS:
            means = estimates(scores, x, k=k, num_draws=args.draws, max_weight=ceiling, floor=floor)
            bias, error = means.mean() - x.mean(), means.std() / args.draws**0.5
            plain = plain or bias
            name = "none" if ceiling > 1e6 else f"{ceiling:g}"
            print(f"| {floor} | {name} | {means.mean():.4f} | {bias:+.4f} | {error:.4f} | {bias / plain:.1%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
