"""Checks the TOML: every key and section must exist in torchtitan's JobConfig or in the run's own sections.

Cost: reads one file.
"""

import importlib
from dataclasses import fields
from typing import Any

from torchtitan.config import ConfigManager, JobConfig

from titan_attent.job_config import JobConfig as OurSections
from titan_attent.systems.system_list import FORMER_KEYS, RENAMED
from titan_attent.titan.first_checks import CUSTOM_CONFIG, check_keys, read_toml
from titan_attent.titan.settings import systems_from


def sections_of(module: str) -> type:
    """The JobConfig class of ``job.custom_config_module``; ValueError if it lacks a required section."""
    try:
        custom = importlib.import_module(module).JobConfig
    except (ImportError, AttributeError) as error:
        raise ValueError(f"[job] custom_config_module = {module}: {error}; check the name, and PYTHONPATH") from None
    missing = {f.name for f in fields(OurSections)} - {f.name for f in fields(custom)}
    if missing:
        raise ValueError(
            f"[job] custom_config_module = {module}: its JobConfig lacks {', '.join(sorted(missing))}; derive it from "
            f"JobConfig of {CUSTOM_CONFIG}"
        )
    for system in systems_from(module):
        if system.name not in {f.name for f in fields(custom)}:
            raise ValueError(
                f'[job] custom_config_module = {module}: its JobConfig has no section "{system.name}" for the system '
                f"{system.__name__}; add the section"
            )
    return custom


def run_custom_import(module: str) -> None:
    """Import ``experimental.custom_import``, which may add flavors and converters, before they are checked.

    Raises:
        ValueError: there is no such module, or an import in it fails. Any other error of the module is its own.
    """
    try:
        if module and isinstance(module, str):  # check_types refuses another type
            importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"[experimental] custom_import = {module}: {error}; check the name, and PYTHONPATH") from error


def check_toml(path: str, *, module: str | None = None) -> dict[str, Any]:
    """Read a TOML file; ValueError if it is missing or malformed, or has a key or section that does not exist.

    Args:
        module: ``job.custom_config_module`` if the command line names one; it takes precedence over the TOML's.
    """
    values = read_toml(path)
    job = values.get("job")
    from_toml = job.get("custom_config_module") if isinstance(job, dict) else None
    custom = sections_of(module or from_toml or CUSTOM_CONFIG)
    for former in RENAMED.keys() & values.keys() - {f.name for f in fields(custom)}:
        raise ValueError(f"{path}: the section [{former}] was renamed to [{RENAMED[former]}]; rename it in the TOML")
    check_keys(values, ConfigManager._merge_configs(JobConfig, custom), path=path, former=FORMER_KEYS)
    return values
