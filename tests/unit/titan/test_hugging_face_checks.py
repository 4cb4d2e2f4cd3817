"""What a family's conversion to Hugging Face's format leaves out is said before training, from names alone."""

import copy
import dataclasses
from typing import Any

import titan_attent.titan.patches.compat  # noqa: F401, I001

import pytest
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.tools.logging import logger

from titan_attent.job_config import JobConfig as OurSections
from titan_attent.titan.checks.hugging_face_checks import check_format, check_names
from titan_attent.titan.train_spec import attent_spec


def checked(family: str, flavor: str, *keys: str, **changed: Any) -> None:
    config: Any = ConfigManager._merge_configs(JobConfig, OurSections)()
    config.model.name, config.model.flavor, config.training.seq_len = f"{family}_attent", flavor, 32
    config.checkpoint.enable = True
    for key in keys:
        setattr(config.checkpoint, key, True)
    spec = attent_spec(config.model.name)
    args: Any = copy.deepcopy(spec.model_args[flavor])
    args.n_layers = 2
    if changed:
        args.moe_args = dataclasses.replace(args.moe_args, **changed)
    check_format(config, dataclasses.replace(spec, model_args={flavor: args}))


@pytest.mark.parametrize(("family", "flavor"), [("hyla", "tiny"), ("mot", "tiny"), ("vit", "tiny")])
@pytest.mark.parametrize("key", ["initial_load_in_hf", "last_save_in_hf"])
def test_our_own_families_have_no_such_format(family: str, flavor: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"\[checkpoint\] {key} = true: {family}_attent has no Hugging Face format"):
        checked(family, flavor, key)
    checked(family, flavor)


@pytest.mark.parametrize(
    ("family", "flavor", "changed", "said"),
    [
        ("llama3", "debugmodel", {}, ""),
        ("qwen3", "debugmodel", {}, ""),
        ("deepseek_v3", "debugmodel", {}, ""),
        ("qwen3", "debugmodel_moe", {"load_balance_coeff": None}, ""),
        ("qwen3", "debugmodel_moe", {}, "layers.0.moe.expert_bias (of 2 biases of the routing) has no name"),
        (
            "gpt_oss",
            "debugmodel",
            {"load_balance_coeff": None},
            "the experts of gpt_oss_attent under the names of",
        ),
    ],
)
def test_what_is_saved_without_a_part_is_warned_of(
    family: str, flavor: str, changed: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger=logger.name):
        checked(family, flavor, "initial_load_in_hf", **changed)
        assert "last_save_in_hf" not in caplog.text
        checked(family, flavor, "last_save_in_hf", **changed)
    assert said in caplog.text and ("last_save_in_hf" in caplog.text) == bool(said)


def test_weights_that_have_no_name_are_refused() -> None:
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        with pytest.raises(ValueError, match=rf"{key} = true: .*leaves out layers\.0\.feed_forward\.w1.* \(of 3 wei"):
            checked("llama4", "debugmodel", key)


def test_experts_in_floating_point_are_refused_by_name() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    check_names({f"{name}_blocks": []}, {f"{name}_blocks": []}, path=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"hf holds {name} in floating point.*initial_load_in_hf_quantized"):
        check_names({f"{name}_blocks": []}, {name: []}, "hf")  # type: ignore[arg-type]
