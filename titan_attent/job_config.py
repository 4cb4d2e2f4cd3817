"""The TOML sections that this package adds to torchtitan's; the dataclass of each is in the package that reads it.

Set ``job.custom_config_module = "titan_attent.job_config"``, and torchtitan's ConfigManager merges them. Neither this
module nor the modules of the sections may use ``from __future__ import annotations``: with string annotations,
ConfigManager replaces sections instead of merging them.
"""

from dataclasses import dataclass, field

from titan_attent.data.config import DataConfig
from titan_attent.models.hyla.config import HylaConfig
from titan_attent.models.mot.config import MotConfig
from titan_attent.models.vision.config import VisionConfig
from titan_attent.systems.distillation.config import DistillationConfig
from titan_attent.systems.freezing.config import FreezingConfig
from titan_attent.systems.highway.config import HighwayConfig
from titan_attent.systems.teaching.config import TeacherConfig


@dataclass
class JobConfig:
    """The sections that ConfigManager merges into torchtitan's JobConfig."""

    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    freezing: FreezingConfig = field(default_factory=FreezingConfig)
    highway: HighwayConfig = field(default_factory=HighwayConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    mot: MotConfig = field(default_factory=MotConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    hyla: HylaConfig = field(default_factory=HylaConfig)
