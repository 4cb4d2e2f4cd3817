"""Every patch of torchtitan and torch, with the versions it is for, and the one call that puts them in force.

``apply_patches()`` is called where titan_attent.titan is imported, before anything of torchtitan is, and with a family
where its model's parts are put together. A patch is applied once in a process, whoever asks. When a version is
installed that a patch was not written for, tests/unit/titan/test_patch_registry.py fails and names it.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from titan_attent.titan.patches import compat, cpu


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One patch.

    Attributes:
        name: for people.
        apply: puts it in force.
        torchtitan, torch: the versions it was written for and tested with; it is not applied under others.
        at_import: before anything of torchtitan is imported, not where a model is put together.
        on_cpu: only where there is no accelerator.
        families: the models that it is for; empty for all.
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
        """Whether the installed versions are among its own."""
        of_torch = SpecifierSet(self.torch).contains(version("torch").partition("+")[0], prereleases=True)
        return of_torch and SpecifierSet(self.torchtitan).contains(version("torchtitan"), prereleases=True)


def _replace_checkpoint_manager() -> None:
    from titan_attent.titan.patches import checkpoint_manager  # imports torchtitan, which waits for the patches of CPUs

    checkpoint_manager.apply()


WITH_EXPERTS = ("qwen3", "llama4", "deepseek_v3", "gpt_oss")

PATCHES = (
    Patch(name="training on CPU with gloo", apply=cpu.apply, at_import=True, on_cpu=True),
    Patch(name="receive buffers and counts of pipeline stages", apply=compat.fix_pipeline_start, at_import=True),
    Patch(name="clipping of gradients that are shares of a sum", apply=compat.fix_clipping, torch=">=2.11,<2.13"),
    Patch(name="the warning that pipeline ranks print no loss", apply=compat.drop_pipeline_warning),
    Patch(name="checkpoints", apply=_replace_checkpoint_manager),
    Patch(name="tied embeddings in one FSDP group", apply=compat.fix_tied_embeddings, families=("qwen3",)),
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
    """Say on the first rank that the installed versions are none that patches were written for."""
    unknown = Patch(name="any", apply=lambda: None)
    if os.environ.get("RANK", "0") == "0" and not unknown.is_for_installed:
        logging.getLogger(__name__).warning(
            f"torch {version('torch')} with torchtitan {version('torchtitan')}: titan_attent's patches are for torch "
            f"{unknown.torch} and torchtitan {unknown.torchtitan}, and are not applied. Install one of these"
        )


def apply_patches(*, family: str | None = None) -> None:
    """Put in force what is not yet.

    Args:
        family: whose model is put together now; None while titan_attent.titan is imported.
    """
    if family is None:
        _warn_of_other_versions()
    for patch in PATCHES:
        if patch.name in _applied or patch.at_import != (family is None) or (patch.on_cpu and not compat.IS_CPU):
            continue
        if (patch.families and family not in patch.families) or not patch.is_for_installed:
            continue
        patch.apply()
        _applied.add(patch.name)
