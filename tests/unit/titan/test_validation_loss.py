"""The validation loss does not depend on label smoothing or mixing in training."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401, I001

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from titan_attent.data.validation_sets import ValidationSet
from titan_attent.models.vision.config import VisionConfig
from titan_attent.titan.models.families import family_of
from titan_attent.titan.models.vision import build_loss
from titan_attent.titan.validator import MeasuredSet, ShardValidator

CLASSES = 5
TRAINING = [{}, {"label_smoothing": 0.1}, {"label_smoothing": 0.4, "mixup": 0.3}, {"cutmix": 1.0}, {"mixup": 1.0}]


def config(**vision: Any) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(name="vit_attent", flavor="tiny"),
        vision=VisionConfig(**vision),
        compile=SimpleNamespace(enable=False, components=[], backend="inductor"),
        data=SimpleNamespace(document_mask=False),
    )


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (8, 1), generator=generator)
    labels[-1] = -100  # padding
    return torch.randn(8, 1, CLASSES, generator=generator), labels


@pytest.mark.parametrize("vision", TRAINING)
def test_only_a_training_loss_is_smoothed(vision: dict[str, float]) -> None:
    loss = build_loss(config(**vision), parallel_dims=None)
    logits, labels = batch()
    with torch.no_grad():
        expected = F.cross_entropy(logits[:, 0], labels[:, 0], reduction="sum")
        assert loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss(logits, labels) == build_loss(config(), parallel_dims=None)(logits, labels)
    smoothing = vision.get("label_smoothing", 0.0)
    expected = F.cross_entropy(logits[:, 0], labels[:, 0], reduction="sum", label_smoothing=smoothing)
    assert loss(logits.clone().requires_grad_(), labels).item() == pytest.approx(expected.item(), rel=1e-5)


class Linear(nn.Module):
    model_args = SimpleNamespace()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def validated(vision: dict[str, float], batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """What a validation over ``batches`` logs, with a model whose weights require gradients, as in a run."""

    class Loader(list[Any]):
        forward_rows = None
        num_tokens = staticmethod(len)

    loader = Loader(({"input": logits.clone(), "example_id": labels[:, 0]}, labels) for logits, labels in batches)
    logged: dict[str, Any] = {}
    validator = ShardValidator(
        config(**vision),
        sets=[MeasuredSet(ValidationSet("", "data"), loader)],  # type: ignore[arg-type]
        tokenizer=None,
        parallel_dims=SimpleNamespace(get_optional_mesh=lambda name: None),  # type: ignore[arg-type]
        loss_fn=build_loss(config(**vision), parallel_dims=None),
        validation_context=nullcontext,  # type: ignore[arg-type]
        maybe_enable_amp=nullcontext(),
        metrics_processor=SimpleNamespace(ntokens_since_last_log=0, log_validation=logged.update),  # type: ignore[arg-type]
        pp_schedule=None,
        pp_has_first_stage=None,
        pp_has_last_stage=None,
    )
    validator.validate([Linear()], step=1)
    return logged


@pytest.mark.parametrize("vision", TRAINING)
def test_validation_logs_the_loss_of_the_label(vision: dict[str, float]) -> None:
    batches = [batch(seed) for seed in range(3)]
    logged = validated(vision, batches)
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert logged["loss"] == pytest.approx(F.cross_entropy(logits[:, 0], labels[:, 0]).item(), rel=1e-6)


def test_validation_without_a_label_that_counts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    logits, labels = batch()
    with pytest.raises(SystemExit):
        validated({}, [(logits, torch.full_like(labels, -100))])
    assert "[data] validation_path = data: none of the labels that are validated counts" in capsys.readouterr().err


def test_the_validation_loss_has_a_name() -> None:
    for vision in TRAINING:
        assert family_of(config(**vision)).modality.validated(config(**vision)) == "cross-entropy"
    names = set()
    for vision in ({}, {"mask_ratio": 0.5}, {"normalize_patches": False}, {"patch_size": 4}):
        autoencoder = config(**vision)
        autoencoder.model.name = "mae_attent"
        names.add(family_of(autoencoder).modality.validated(autoencoder))
    assert len(names) == 4 and sum("in variances of the training images" in text for text in names) == 1
