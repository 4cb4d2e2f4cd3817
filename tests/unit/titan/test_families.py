"""titan/models/families.py: a run that needs a feature which its family lacks is refused."""

import sys
import types
from dataclasses import replace

import titan_attent.titan.patches.compat  # noqa: F401

import pytest
from distributed.parallel_world import config_of

from titan_attent.systems.system import System
from titan_attent.systems.system_list import SYSTEMS
from titan_attent.titan.checks.parallelism import check_parallelism
from titan_attent.titan.checks.preflight import check_needs
from titan_attent.titan.models import families
from titan_attent.titan.models.families import FAMILIES, add_families, family_of
from titan_attent.titan.train_spec import attent_spec

DIMENSIONS = {f"{name}_parallel" for name in ("tensor", "context", "pipeline", "expert")}


class Needy(System):
    name = "needy"
    needs = ("tokens", "wings")
    off = "enable = false"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_spec_and_lacks_only_features_that_are_checked(name: str) -> None:
    assert attent_spec(f"{name}_attent").model_args
    checked = DIMENSIONS | {need for system in SYSTEMS for need in system.needs}
    assert FAMILIES[name].lacks.keys() <= checked


LACKING = [(family.name, one) for family in FAMILIES.values() for one in sorted(DIMENSIONS & family.lacks.keys())]


@pytest.mark.parametrize(("name", "dimension"), LACKING)
def test_a_dimension_that_a_family_lacks(name: str, dimension: str) -> None:
    sizes = {f"parallelism.{dimension}_degree": 2, "model.name": f"{name}_attent", "training.seq_len": 16}
    if dimension == "expert_parallel":
        sizes["parallelism.data_parallel_shard_degree"] = 2
    with pytest.raises(ValueError, match=rf"\[parallelism\] {dimension}_degree = 2: .*Set it to 1"):
        check_parallelism(config_of(sizes, data="", folder=""), world_size=2)


def test_families_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(FAMILIES))
    for _ in range(2):  # a command that parses twice
        add_families("integration.mixer")
        add_families("titan_attent.job_config")
    assert families.FAMILIES.keys() - FAMILIES.keys() == {"mixer"}
    module = types.ModuleType("outside")
    monkeypatch.setitem(sys.modules, "outside", module)
    module.FAMILIES = (replace(FAMILIES["llama3"]), 3)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match='custom_config_module = outside: the name "llama3" of a family is taken'):
        add_families("outside")
    module.FAMILIES = (3,)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"outside: 3 in its FAMILIES is not a titan_attent\.titan\.models\.family"):
        add_families("outside")


def test_what_a_system_needs() -> None:
    check_needs(FAMILIES["llama3"], [Needy])
    with pytest.raises(
        ValueError,
        match=r"\[needy\] with vit_attent: it is for text, and vit_attent trains on images. Set enable = false",
    ):
        check_needs(FAMILIES["vit"], [Needy])


def test_a_family_is_found_by_the_models_name() -> None:
    config = config_of({"model.name": "gpt_oss_attent"}, data="", folder="")
    assert family_of(config) is FAMILIES["gpt_oss"]
