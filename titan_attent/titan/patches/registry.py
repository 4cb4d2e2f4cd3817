"""Lists every patch of torchtitan and torch with the versions it is for, and applies them.

``apply_patches()`` is called twice: when torchtitan is imported (at_import.py); and, with a family, when the model's
TrainSpec is built. A patch is applied once per process. If an installed version is one that a patch was not
written for, tests/unit/titan/test_patch_registry.py fails and names the patch.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from titan_attent.titan.patches import compat, cpu, flex_attention


@dataclass(frozen=True, kw_only=True)
class Patch:
    """A patch of torchtitan or torch.

    Attributes:
        name: its name for people.
        apply: applies the patch.
        torchtitan, torch: the versions it was written for and tested with; it is not applied under others.
        at_import: whether it is applied when torchtitan is imported, instead of when a TrainSpec is built.
        on_cpu: whether it is applied only if there is no accelerator.
        families: the families of models that it is for; empty for all.
    """

    name: str
    apply: Callable[[], None]
    torchtitan: str = "==0.2.2"
    torch: str = ">=2.11,<2.16"
    at_import: bool = False
    on_cpu: bool = False
    families: tuple[str, ...] = ()

    @property
    def is_for_installed(self) -> bool:
        """Whether the patch is for the installed versions."""
        is_for_torch = SpecifierSet(self.torch).contains(version("torch").partition("+")[0], prereleases=True)
        return is_for_torch and SpecifierSet(self.torchtitan).contains(version("torchtitan"), prereleases=True)

    def is_due(self, family: str | None) -> bool:
        """Whether :func:`apply_patches` with this argument applies it."""
        if self.name in _applied or self.at_import != (family is None) or (self.on_cpu and not compat.IS_CPU):
            return False
        return (not self.families or family in self.families) and self.is_for_installed


def _replace_checkpoint_manager() -> None:
    from titan_attent.titan.patches import checkpoint_manager  # imports torchtitan, which must follow the CPU patch

    checkpoint_manager.apply()


WITH_EXPERTS = ("qwen3", "llama4", "deepseek_v3", "gpt_oss")

PATCHES = (
    Patch(name="training on CPU with gloo", apply=cpu.apply, at_import=True, on_cpu=True),
    Patch(name="receive buffers and counts of pipeline stages", apply=compat.fix_pipeline_start, at_import=True),
    Patch(name="clipping of gradients that are shares of a sum", apply=compat.fix_clipping, torch=">=2.11,<2.13"),
    Patch(name="the warning that pipeline ranks print no loss", apply=compat.drop_pipeline_warning),
    Patch(name="checkpoints", apply=_replace_checkpoint_manager),
    Patch(name="tied embeddings in one FSDP group", apply=compat.fix_tied_embeddings, families=("qwen3",)),
    Patch(name="llama4's weights in safetensors", apply=compat.fix_llama4_format, families=("llama4",)),
    Patch(name="masks of llama4's layers", apply=flex_attention.fix_llama4_masks, families=("llama4",)),
    Patch(name="flex attention of qwen3 on local heads", apply=flex_attention.fix_qwen3_heads, families=("qwen3",)),
    *(
        Patch(
            name=f"router gradients of {family} under tensor parallelism",
            apply=lambda family=family: compat.fix_router_gradients(family),  # type: ignore[misc]
            families=(family,),
        )
        for family in WITH_EXPERTS
    ),
)

_applied: set[str] = set()


def _warn_of_other_versions() -> None:
    """Warn on rank 0 if the patches are not for the installed versions."""
    default = Patch(name="any", apply=lambda: None)
    if os.environ.get("RANK", "0") == "0" and not default.is_for_installed:
        logging.getLogger(__name__).warning(
            f"torch {version('torch')} with torchtitan {version('torchtitan')}: titan_attent's patches are for torch "
            f"{default.torch} and torchtitan {default.torchtitan}, and are not applied. Install one of these versions"
        )


@contextmanager
def patched_import() -> Iterator[None]:
    """Surrounds the import of torchtitan: its modules see the patched device type, and the patches follow."""
    is_due = any(patch.apply is cpu.apply and patch.is_due(None) for patch in PATCHES)
    with cpu.device_type() if is_due else nullcontext():
        yield
    apply_patches()


def apply_patches(*, family: str | None = None) -> None:
    """Apply the patches that are due and not applied yet; ImportError on CPU if torchtitan was imported before.

    Args:
        family: the family whose TrainSpec is built now; None when torchtitan is imported.
    """
    if family is None:
        _warn_of_other_versions()
    for patch in PATCHES:
        if patch.is_due(family):
            patch.apply()
            _applied.add(patch.name)
