"""titan/patches/registry.py: every patch is for the installed versions, and is applied once."""

import importlib
import subprocess
import sys
from collections import Counter
from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet

from titan_attent.titan.models.families import FAMILIES
from titan_attent.titan.patches import compat, registry
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
    stock = [name for name, family in FAMILIES.items() if family.train_spec is None]
    shards = {name: importlib.import_module(f"torchtitan.models.{name}.infra.parallelize") for name in stock}
    assert set(WITH_EXPERTS) == {name for name, module in shards.items() if hasattr(module, "apply_moe_ep_tp")}
    assert {family for patch in PATCHES for family in patch.families} <= FAMILIES.keys()


IMPORTS = """
import sys
import titan_attent.titan
from titan_attent.titan.first_checks import check_ranges

assert not {"torch", "torchtitan"} & sys.modules.keys()
import torchtitan  # by any module, also by one of the user's
import torch
import torchtitan.tools.utils as utils
from titan_attent.titan.patches import compat, registry

assert utils.device_type == ("cpu" if compat.IS_CPU else torch.accelerator.current_accelerator().type)
assert {patch.name for patch in registry.PATCHES if patch.at_import and (compat.IS_CPU or not patch.on_cpu)
        and patch.is_for_installed} == registry._applied != set()
assert torchtitan.components is sys.modules["torchtitan.components"]
assert type(torchtitan.__spec__.loader).__name__ == "SourceFileLoader" == type(torchtitan.__loader__).__name__
"""


def test_patches_are_applied_when_torchtitan_is_imported_and_not_before() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_on_cpu_torchtitan_must_not_be_imported_first() -> None:
    code = "import torchtitan, titan_attent.titan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) != compat.IS_CPU
    assert "import titan_attent.titan first" in done.stderr or not compat.IS_CPU
