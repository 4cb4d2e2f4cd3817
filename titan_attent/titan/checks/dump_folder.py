"""Refuses a new run in the folder of another one: a folder is for one run.

A run that resumes, or that starts again with the same settings, continues in its folder. A new run with other settings
would mix its events with those of the earlier run, and the report would draw both as one curve.

Cost: one small file.
"""

from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig

from titan_attent.data.run_record import read_run_record
from titan_attent.titan.checks.load_sources import source_of
from titan_attent.titan.settings import chosen_of, configured_of


def check_dump_folder(job_config: JobConfig, *, setting: dict[str, Any]) -> None:
    """Refuse to start from the beginning in a folder whose record is of other settings; ValueError.

    Args:
        setting: the run's own, as in :class:`RunRecord`.
    """
    source, folder = source_of(job_config), Path(job_config.job.dump_folder)
    if source is not None and source.is_own:
        return  # a resume; resume_checks.py compares it with its checkpoint
    stored = read_run_record(folder)
    pairs = [(key, stored.setting.get(key), value) for key, value in setting.items() if key in stored.setting]
    if stored.configured is not None:
        before, now = (chosen_of(keys, job_config) for keys in (stored.configured, configured_of(job_config)))
        pairs += [(key, before.get(key, "default"), now.get(key, "default")) for key in sorted({*before, *now})]
    differing = [f"{key} was {was} and is {value}" for key, was, value in pairs if was != value]
    if differing:
        raise ValueError(
            f"[job] dump_folder = {folder} holds another run: {'; '.join(differing[:3])} (of {len(differing)} "
            "differences), and no checkpoint that this run starts from. The files of the two would mix: name another "
            "folder, or delete this one"
        )
