"""Logs the metrics of the package and of the systems together with torchtitan's metrics.

Under a pipeline, ranks without the last stage have no loss, and torchtitan prints -1 or -2 instead. Here, at every
logged step, the rank with the last stage sends its loss to the other ranks. So every rank prints the loss, and all
ranks decide alike whether it is finite (health.py).

Cost: under a pipeline, one all-reduce of two numbers per logged step.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs

from titan_attent.titan.pipeline import from_last_stage
from titan_attent.titan.tensorboard import write_start

MAX_EXPONENT = 700.0
"""exp of more is no finite float64."""


def perplexity(loss: float) -> float:
    """exp of a loss in nats per token, finite."""
    return math.exp(min(loss, MAX_EXPONENT))


class TeachingMetricsProcessor(MetricsProcessor):
    """Logs ``run_metrics()`` with every training step that torchtitan logs; see :meth:`follow`."""

    run_metrics: Callable[[], dict[str, float]] | None = None
    tokens_per_image: int | None = None
    """Tokens per image, to log images per second; None for text."""

    from_last_stage: Callable[[tuple[float, float]], list[float]] | None = None
    """Returns the numbers of the last stage on all ranks; None without a pipeline."""
    logged: Callable[[int, float, float], None] | None = None
    """Called with step, loss and gradient norm after a training step was logged."""
    validated: Callable[[int, float], None] | None = None
    """Called with step and loss after a validation was logged."""

    def follow(
        self,
        *,
        run_metrics: Callable[[], dict[str, float]],
        logged: Callable[[int, float, float], None],
        validated: Callable[[int, float], None],
        tokens_per_image: int | None,
        is_last_stage: bool,
        device: torch.device,
    ) -> None:
        """Log ``run_metrics`` with torchtitan's; pass the logged numbers to ``logged`` and ``validated``."""
        self.run_metrics, self.logged, self.validated = run_metrics, logged, validated
        self.tokens_per_image = tokens_per_image
        mesh = self.parallel_dims.get_optional_mesh("pp")
        if mesh is not None:
            self.from_last_stage = partial(from_last_stage, is_last=is_last_stage, mesh=mesh, device=device)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        if self.from_last_stage is not None:
            global_avg_loss, global_max_loss = self.from_last_stage((global_avg_loss, global_max_loss))
        # torchtitan divides the loss of one context parallel shard by the number of tokens of all shards (#3111).
        global_max_loss *= self.parallel_dims.cp
        metrics = self.run_metrics() if self.run_metrics is not None else {}
        if self.tokens_per_image is not None:
            images = self.ntokens_since_last_log / self.tokens_per_image
            metrics = metrics | {"throughput(ips)": images / (time.perf_counter() - self.time_last_log)}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=(extra_metrics or {}) | metrics)
        if self.logged is not None:
            self.logged(step, global_avg_loss, grad_norm)

    def text_logger(self, *, step: Callable[[], int]) -> Callable[[str, Callable[[], str]], None] | None:
        """The ``log_text`` of a :class:`~titan_attent.systems.system.Run`; ``step`` returns the current step."""
        if not self.job_config.metrics.enable_tensorboard:
            return None
        loggers = getattr(self.logger, "_loggers", [])  # none on ranks that do not log
        writers = [one for one in loggers if hasattr(one, "log_text")]  # compat.continue_tensorboard

        def log_text(tag: str, text: Callable[[], str]) -> None:
            if writers:
                content = text()
                for writer in writers:
                    writer.log_text(tag, content, step())

        return log_text

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        if self.tokens_per_image is None:
            extra_metrics = (extra_metrics or {}) | {"validation_metrics/perplexity": perplexity(loss)}
        super().log_validation(loss, step, extra_metrics)
        if self.validated is not None:
            self.validated(step, loss)


def build_teaching_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs | None = None
) -> TeachingMetricsProcessor:
    """Implements torchtitan's ``build_metrics_processor_fn``, which is called with positional arguments."""
    del model_args
    processor = TeachingMetricsProcessor(job_config, parallel_dims)
    write_start(processor.logger, job_config)
    return processor
