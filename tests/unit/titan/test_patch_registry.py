"""titan/patches/registry.py: every patch is for the installed versions, and is applied once."""

import importlib
from collections import Counter
from importlib.metadata import version

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from packaging.specifiers import SpecifierSet

from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.patches import registry
from titan_attent.titan.patches.registry import PATCHES, WITH_EXPERTS, Patch, apply_patches


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_it_is_for_the_installed_versions(patch: Patch) -> None:
    """Fails if a torchtitan or torch is installed that no patch was tested with.

    Read what changed in it, then widen the versions of the patch, or drop it.
    """
    assert version("torchtitan") in SpecifierSet(patch.torchtitan)
    newest = max(SpecifierSet(one.torch).__str__() for one in PATCHES)
    assert version("torch").partition("+")[0] in SpecifierSet(newest), "no patch was tried with this torch"


def test_a_patch_for_other_versions_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    made = {
        "now": Patch(name="now", apply=lambda: seen.append("now")),
        "older torch": Patch(name="older torch", apply=lambda: seen.append("older torch"), torch="<2.0"),
        "newer titan": Patch(name="newer titan", apply=lambda: seen.append("newer titan"), torchtitan=">=0.3"),
        "import": Patch(name="import", apply=lambda: seen.append("import"), at_import=True),
        "other": Patch(name="other", apply=lambda: seen.append("other"), families=("gpt_oss",)),
    }
    monkeypatch.setattr(registry, "PATCHES", tuple(made.values()))
    monkeypatch.setattr(registry, "_applied", set())
    apply_patches()
    assert seen == ["import"]
    for _ in range(2):  # applied once, however often it is called
        apply_patches(family="llama3")
    assert seen == ["import", "now"]
    apply_patches(family="gpt_oss")
    assert seen == ["import", "now", "other"]


def test_names_are_their_own_and_families_exist() -> None:
    assert max(Counter(patch.name for patch in PATCHES).values()) == 1
    text = [name for name, family in FAMILIES.items() if not family.modality.is_of_images]
    shards = {name: importlib.import_module(f"torchtitan.models.{name}.infra.parallelize") for name in text}
    assert set(WITH_EXPERTS) == {name for name, module in shards.items() if hasattr(module, "apply_moe_ep_tp")}
    assert {family for patch in PATCHES for family in patch.families} <= FAMILIES.keys()
