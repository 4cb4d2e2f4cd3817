"""What a run writes to TensorBoard besides scalars: its configuration, and the order in which its charts are shown.

TensorBoard's page of scalars sorts the groups by name, so the ledger stands above the loss. The page "Custom scalars"
has them in the order in which they are looked at: loss and validation, the teacher, speed, cost.
"""

from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, LoggerContainer
from torchtitan.config import JobConfig

from titan_attent.foundations.toml import to_toml

LAYOUT: dict[str, dict[str, list[Any]]] = {
    "loss": {
        "training and validation": ["Multiline", ["loss_metrics/global_avg_loss$", "validation_metrics/loss$"]],
        "validation perplexity": ["Multiline", ["validation_metrics/perplexity$"]],
        "bits per byte": ["Multiline", ["validation_metrics/bits_per_byte.*"]],
        "loss of each validation set": ["Multiline", ["validation_metrics/loss/.*"]],
        "loss of each source": ["Multiline", ["(loss|validation)_metrics/by_source/.*"]],
        "gradient norm": ["Multiline", ["grad_norm$"]],
        "learning rate": ["Multiline", ["lr$"]],
    },
    "teacher": {
        "share selected": ["Multiline", ["teacher/ratio$"]],
        "times that a selected example is trained": ["Multiline", ["teacher/repeats$"]],
        "importance": ["Multiline", ["teacher/importance_.*"]],
        "share selected of each source": ["Multiline", ["teacher/inclusion/.*"]],
    },
    "speed": {
        "throughput, tokens or images a second": ["Multiline", [r"throughput\(.*"]],
        "memory": ["Multiline", ["memory/max_.*GiB.*"]],
    },
    "ledger": {"cost of teaching": ["Multiline", ["ledger/.*"]]},
}
"""Category -> chart -> its tags, as regular expressions (torch's ``SummaryWriter.add_custom_scalars``)."""
EXACT_MATCH: dict[str, list[Any]] = {
    "answers that match exactly": ["Multiline", ["validation_metrics/(exact|input)_match.*"]],
    "loss of the worst inputs": ["Multiline", ["validation_metrics/input_loss_.*"]],
}
"""In front of them with ``[data] exact_match``."""
MIXTURE: dict[str, list[Any]] = {
    "epochs of each source": ["Multiline", ["mixture/epochs/.*"]],
    "proportion of each source": ["Multiline", ["mixture/proportion/.*"]],
    "share of each source so far": ["Multiline", ["mixture/share/.*"]],
}
"""Behind them with ``[data.sources]``."""


def write_start(logger: BaseLogger, job_config: JobConfig) -> None:
    """Let ``logger`` write the layout and the configuration, as text, when it opens TensorBoard's file on this rank."""
    layout = {"answers": EXACT_MATCH} | LAYOUT if job_config.data.exact_match else LAYOUT
    if job_config.data.sources:
        layout = layout | {"mixture": MIXTURE}
    sections = {name: keys for name, keys in job_config.to_dict().items() if isinstance(keys, dict)}

    def write(writer: SummaryWriter, step: int) -> None:
        writer.add_custom_scalars(layout)
        # Markdown shows indented lines as they are.
        text = "\n".join(f"    {line}" for line in to_toml(sections).splitlines())
        writer.add_text("configuration", text, step)

    for one in logger._loggers if isinstance(logger, LoggerContainer) else [logger]:
        if hasattr(one, "on_open"):  # compat.continue_tensorboard
            one.on_open = write
