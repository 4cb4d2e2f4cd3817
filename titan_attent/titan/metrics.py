"""torchtitan's metrics, and beside them the metrics of the systems."""

import time
from collections.abc import Callable
from typing import Any

from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs


class TeachingMetricsProcessor(MetricsProcessor):
    """Logs ``system_metrics()`` with every training step that torchtitan logs; the trainer sets it.

    The numbers are host values that the systems hold ready, so that logging adds no collective and no device sync.
    """

    system_metrics: Callable[[], dict[str, float]] | None = None
    tokens_per_image: int | None = None
    """Where images are trained: their throughput is logged, too."""

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        # torchtitan divides the loss of a part of the sequences by the tokens of the whole ones (#3111).
        global_max_loss *= self.parallel_dims.cp
        ours = self.system_metrics() if self.system_metrics is not None else {}
        if self.tokens_per_image is not None:
            images = self.ntokens_since_last_log / self.tokens_per_image
            ours = ours | {"throughput(ips)": images / (time.perf_counter() - self.time_last_log)}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=(extra_metrics or {}) | ours)


def build_teaching_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs | None = None
) -> TeachingMetricsProcessor:
    """torchtitan's ``build_metrics_processor_fn``; called with positional arguments."""
    del model_args
    return TeachingMetricsProcessor(job_config, parallel_dims)
