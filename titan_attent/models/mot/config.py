"""The TOML section ``[mot]``: settings of the mixture of transformers. Only ``mot_attent`` reads it.

It must not use ``from __future__ import annotations``: with string annotations torchtitan's ConfigManager replaces
sections instead of merging them.
"""

from dataclasses import dataclass

from titan_attent.foundations.checks import check_number


@dataclass
class MotConfig:
    num_experts: int = 4
    """Experts per block, at least 1. Each has the size of the flavor, so a token costs the same with any number."""

    prefix: int = 16
    """
    Tokens at the start of a window that decide its route. The first prefix - 1 labels of every window, tokens that the
    route has seen, count in no loss: neither in training nor in validation nor in scores.
    """

    noise: float = 1.0
    """
    Exploration: each gate logit gets noise from [0, noise) before the largest is taken, in training only. The noise is
    a hash of (seed, step, example, layer, expert). 0: none.
    """

    noise_steps: int = 0
    """Number of first steps with exploration noise, as in stage I of the paper. 0: all steps."""

    balance: float = 0.01
    """Weight of the balance loss, which is 1 where the experts have equal shares of the sequences. 0: none."""

    shared_attention: bool = False
    """Whether all experts of a block share one attention, and only feed-forwards are routed: a control."""

    seed: int = 0
    """Seed of the exploration noise."""

    def validate(self) -> None:
        """Raise a ValueError that names the key, its value and the fix if any value is out of its range."""
        for key, min_value in {"num_experts": 1, "prefix": 1, "noise_steps": 0}.items():
            check_number(key, getattr(self, key), at_least=min_value, whole=True, section="mot")
        for key in ("noise", "balance"):
            check_number(key, getattr(self, key), at_least=0, section="mot")
        check_number("seed", self.seed, whole=True, section="mot")
