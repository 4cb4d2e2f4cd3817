"""What a command line needs no torch for: ``--help``, keys, types and ranges of the configuration, missing folders.

Importing torch and torchtitan takes seconds. So ``titan_attent.train`` makes these checks before, on rank 0, with
torchtitan's own configuration classes: two modules of the installed package, which are loaded without the imports of
their packages. The complete checks follow in titan/checks, and use the functions of this module. Where these classes
cannot be loaded in this way, or the run has a configuration module of its own, nothing is checked here.

Cost: 0.5 s of CPU, most of it tyro's parser.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from titan_attent.data.plan.proportions import parse_sources
from titan_attent.data.validation_sets import validation_sets
from titan_attent.foundations.checks import check_number, check_one_of, closest
from titan_attent.foundations.file_lock import LOCK_FILE, check_free
from titan_attent.job_config import JobConfig as OurSections
from titan_attent.systems.freezing.config import FORMER_NAME as FORMERLY_FREEZING
from titan_attent.systems.highway.config import FORMER_NAME as FORMERLY_HIGHWAY
from titan_attent.systems.teaching.config import FORMER_KEYS
from titan_attent.systems.teaching.config import RANGES as TEACHER_RANGES

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CUSTOM_CONFIG = "titan_attent.job_config"
"""The default of ``job.custom_config_module``: the module with this package's sections."""
FORMER_SECTIONS = (FORMERLY_FREEZING, FORMERLY_HIGHWAY)
"""Sections of earlier versions, for which the complete checks have a message."""

RANGES: dict[str, dict[str, Any]] = {
    "training.steps": {"at_least": 0, "whole": True},
    "training.local_batch_size": {"at_least": 1, "whole": True},
    "training.seq_len": {"at_least": 1, "whole": True},
    "training.max_norm": {"above": 0, "finite": False},  # 0 zeroes every gradient; a negative norm flips its sign
    "lr_scheduler.warmup_steps": {"at_least": 0, "whole": True},
    "lr_scheduler.decay_ratio": {"at_least": 0, "at_most": 1},
    "lr_scheduler.min_lr_factor": {"at_least": 0, "at_most": 1},
    "metrics.log_freq": {"at_least": 1, "whole": True},
    "comm.init_timeout_seconds": {"at_least": 1, "whole": True},
    "comm.train_timeout_seconds": {"at_least": 1, "whole": True},
    "comm.trace_buf_size": {"at_least": 0, "whole": True},
    "debug.seed": {"at_least": -(2**63), "below": 2**63, "whole": True},
}
"""Arguments of :func:`check_number`; a key that is None is not checked."""

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "left out"}


CHECK = "--check"
"""The option with which the command checks and plans a run instead of training."""


def check_option(argv: list[str]) -> tuple[list[str], int | None]:
    """The other arguments, and the number of processes to plan for; None without ``--check``.

    By default it is that of torchrun, or 1. ValueError for one that is not a positive whole number.
    """
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name != CHECK:
            continue
        rest = argv[i + 1 :]
        if not equals and rest and not rest[0].startswith("-"):
            value, rest = rest[0], rest[1:]
        value = value or os.environ.get("WORLD_SIZE", "1")
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"{CHECK} {value}: give the number of processes of the run, such as {CHECK} 64")
        return argv[:i] + rest, int(value)
    return argv, None


def check_command_line(module: str) -> None:
    """End the process for ``--help`` or a mistake that is seen without torch; else return."""
    try:
        argv, planned_size = check_option(sys.argv[1:])
    except ValueError:
        return  # the command itself says it
    if planned_size is None:
        argv = arguments(module)
    if os.environ.get("RANK", "0") != "0" or {"torch", "torchtitan"} & sys.modules.keys():
        return
    try:
        _check(argv, starts=planned_size is None)
    except ValueError as error:
        print(f"titan_attent: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if planned_size is None else 1)


def _check(argv: list[str], *, starts: bool) -> None:
    """ValueError for a mistake; ``starts``: whether the command also trains."""
    for arg in argv:
        name = arg.partition("=")[0].removeprefix("--").replace("-", "_")
        if name.partition(".")[0] in FORMER_SECTIONS or name in {f"teacher.{key}" for key in FORMER_KEYS}:
            return
    config_file = option(argv, "job.config_file")
    values = read_toml(config_file) if config_file is not None else {}
    job = values.get("job")
    given = option(argv, "job.custom_config_module") or (
        job.get("custom_config_module") if isinstance(job, dict) else ""
    )
    if (given or CUSTOM_CONFIG) != CUSTOM_CONFIG or values.keys() & set(FORMER_SECTIONS):
        return
    with _torchtitan_config() as manager:
        if manager is None:
            return
        stock = manager.config_cls
        if config_file is not None:
            former = {f"teacher.{key}": instead for key, instead in FORMER_KEYS.items()}
            check_keys(values, manager._merge_configs(stock, OurSections), path=config_file, former=former)
        try:
            config = manager.parse_args(argv if given else [*argv, "--job.custom_config_module", CUSTOM_CONFIG])
        except AssertionError as error:  # raised by torchtitan's own checks of a section
            raise ValueError(str(error)) from None
        for section in fields(config):
            check_types(getattr(config, section.name), where=section.name)
        check_ranges(config, RANGES)
        check_ranges(config, {f"teacher.{key}": bounds for key, bounds in TEACHER_RANGES.items()})
        parse_sources(config.data.sources)
        check_folders(config)
        if starts:
            check_free(Path(config.job.dump_folder) / LOCK_FILE, "[job] dump_folder")


@contextmanager
def _torchtitan_config() -> Iterator[Any]:
    """A ConfigManager of torchtitan, loaded without torch; None if it cannot be. Its modules are forgotten again."""
    before = set(sys.modules)
    try:
        try:
            spec = importlib.util.find_spec("torchtitan")
            assert spec is not None and spec.submodule_search_locations
            (root,) = spec.submodule_search_locations
            for name, folder in (("torchtitan", root), ("torchtitan.config", str(Path(root) / "config"))):
                package = sys.modules[name] = ModuleType(name)
                package.__path__ = [folder]
            sys.modules["torch"] = ModuleType("torch")  # imported by job_config.py, but not read by its classes
            try:
                loaded = importlib.import_module("torchtitan.config.manager")
            finally:
                del sys.modules["torch"]
            manager = loaded.ConfigManager()
            manager._validate_config = lambda: None  # it warns, and the complete checks call it
        except Exception:  # another version of torchtitan
            manager = None
        yield manager
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchtitan":
                del sys.modules[name]


def arguments(module: str, *, first: str = "") -> list[str]:
    """The arguments of the command line; ends the process if torchrun did not start it.

    Args:
        first: the words before the options, for the message.
    """
    if "LOCAL_RANK" not in os.environ:
        command = " ".join(filter(None, (module, first)))
        sys.exit(f"titan_attent: start it with torchrun --nproc_per_node=N -m {command} --job.config_file X.toml")
    return sys.argv[1:]


def option(argv: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``; None if the option is not given."""
    for i, arg in enumerate(argv):
        key, equals, value = arg.partition("=")
        if key.replace("-", "_") == f"__{name}":
            return value if equals else "".join(argv[i + 1 : i + 2])
    return None


def read_toml(path: str) -> dict[str, Any]:
    """The values of a TOML file; ValueError if it is missing or malformed."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"the config file {path} does not exist: check --job.config_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def check_keys(
    values: Mapping[str, Any], section: type, *, path: str, former: Mapping[str, str], where: str = ""
) -> None:
    """Refuse keys and sections of a TOML that ``section``, a dataclass of dataclasses, does not have; ValueError.

    Args:
        path: the file, for the message.
        former: key of an earlier version, as ``section.key`` -> the message that names its successor.
        where: the name of the section; "" for the whole file.
    """
    keys = {f.name: f.type for f in fields(section)}
    for key, value in values.items():
        location = f"[{where}]" if where else "the top level"
        if key not in keys and (successor := former.get(f"{where}.{key}")):
            raise ValueError(f"{path}: [{where}] {key}: {successor}")
        if key not in keys:
            raise ValueError(
                f'{path}: unknown key "{key}" in {location}{closest(key, keys) or "."} '
                f"Its keys are {', '.join(sorted(keys))}"
            )
        declared = keys[key]
        if isinstance(declared, type) and is_dataclass(declared):
            name = f"{where}.{key}" if where else key
            if not isinstance(value, dict):
                raise ValueError(f"{path}: {name} is a section: write [{name}] and its keys below it")
            check_keys(value, declared, path=path, former=former, where=name)


def check_ranges(config: Any, ranges: Mapping[str, dict[str, Any]]) -> None:
    """Refuse values outside their range; ``ranges``: "section.key" -> arguments of :func:`check_number`."""
    for path, bounds in ranges.items():
        name, _, key = path.partition(".")
        value = getattr(getattr(config, name), key)
        if value is not None:
            check_number(key, value, section=name, **bounds)


def check_folders(config: Any) -> None:
    """Refuse folders that a run would read and that do not exist; ValueError."""
    data, teacher = config.data, config.teacher
    sets = validation_sets(data)
    read = {"path": data.path} | ({one.key: one.path for one in sets} if config.validation.enable else {})
    for key, path in read.items():
        if path and not Path(path).is_dir():
            kind = "images" if config.model.name.startswith(("vit_", "mae_")) else "text"
            raise ValueError(
                f"[data] {key}: {path}: not a data set, no such folder; correct the path, or make one with "
                f"`python -m titan_attent.data.{kind}`"
            )
    if teacher.strategy != "uniform" and teacher.scores and not Path(teacher.scores).is_dir():
        raise ValueError(
            f"[teacher] scores: {teacher.scores}: no such folder; correct the path, or write scores with "
            "`torchrun -m titan_attent.score pair`"
        )


def check_types(section: Any, *, where: str) -> None:
    """Refuse values whose type differs from the section's declaration, also in nested sections."""
    for declared in fields(section):
        value, annotation = getattr(section, declared.name), declared.type
        if is_dataclass(value):
            check_types(value, where=f"{where}.{declared.name}")
            continue
        types = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        if any(one in TYPE_NAMES and _is_instance(value, one) for one in types):
            continue
        for one in types:
            if get_origin(one) is Literal:
                check_one_of(declared.name, value, get_args(one), section=where)
        if all(one in TYPE_NAMES for one in types):
            allowed = " or ".join(TYPE_NAMES[one] for one in types if one is not type(None))
            raise ValueError(f"[{where}] {declared.name} = {value!r}: it must be {allowed}")


def _is_instance(value: object, declared: Any) -> bool:
    """Whether a TOML value has the declared type: a bool is not a number, and an int may be a float."""
    if isinstance(value, bool):
        return declared is bool
    return isinstance(value, (int, float) if declared is float else declared)
