"""Importance: how much an example has left to teach, from the loss buffer alone. Pure and elementwise.

AtteNT (Nonparametric Teaching of Attention Learners, ICLR 2026, arXiv 2602.20461, section 4) teaches the examples whose
functional gradient is largest; for a convex loss its norm grows with the deviation from the target, of which the
example's loss is the measure at hand.

Every score is fp32 [num_local]. +inf: never trained, comes first. -inf: trained, but its loss was never finite, comes
last, so that a broken example is not taught again and again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from titan_attent.loss_buffer import NEVER, LossBuffer


def loss(buffer: LossBuffer) -> Tensor:
    """The last loss, mean nats a token."""
    return buffer.loss


IMPORTANCES: dict[str, Callable[[LossBuffer], Tensor]] = {"loss": loss}


def importance(buffer: LossBuffer, *, name: str) -> Tensor:
    """Score this rank's examples: fp32 [num_local], +inf and -inf as above. ``name``: a key of ``IMPORTANCES``."""
    scored = IMPORTANCES[name](buffer)
    unscored: dict[str, Any] = {"dtype": torch.float32, "device": scored.device}
    never = torch.tensor(float("inf"), **unscored)
    broken = torch.tensor(float("-inf"), **unscored)
    return torch.where(buffer.step != NEVER, scored, torch.where(buffer.visits == 0, never, broken))
