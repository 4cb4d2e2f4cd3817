"""The documented plain-PyTorch loop runs as printed, on other data and for fewer steps; all TOML sections are valid."""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from titan_attent.job_config import DataConfig, FreezingConfig, HighwayConfig, MotConfig, TeacherConfig, VisionConfig
from titan_attent.systems.teaching.config_checks import check_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LOOP = ROOT / "docs" / "guide" / "own_loop.md"
OURS: dict[str, Any] = {
    "teacher": TeacherConfig,
    "freezing": FreezingConfig,
    "highway": HighwayConfig,
    "mot": MotConfig,
    "vision": VisionConfig,
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_plain_pytorch_loop(token_data: dict[str, Path]) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", LOOP.read_text(encoding="utf-8"), flags=re.S)
    replaced = {"data/quickstart/train": str(token_data["train"]), "4096": "512", "1000": "40", "1001": "41"}
    for printed, here in replaced.items():  # the data with its vocabulary, and the steps
        assert printed in snippet
        snippet = re.sub(rf"\b{re.escape(printed)}\b", here, snippet)
    # Watch what the loop does through the one call it makes in every step.
    names: dict[str, Any] = {}
    snippet += "    LOSSES.append((sums / counts).mean().item())\n"
    names["LOSSES"] = []
    torch.manual_seed(0)
    exec(compile(snippet, str(LOOP), "exec"), names)
    assert len(names["LOSSES"]) == 40
    assert names["LOSSES"][-1] < names["LOSSES"][0] - 0.5
    teacher, buffer = names["teacher"], names["buffer"]
    assert teacher.round >= 2 and teacher.rounds.in_tail
    buffer.sync()
    assert int(buffer.visits.sum()) == 40 * 32


def test_sections() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"^ *```toml\n(.*?)```", text, flags=re.S | re.M)
    assert len(blocks) == 19
    for block in blocks:
        sections = tomllib.loads(textwrap.dedent(block))
        DataConfig(**sections.pop("data", {}))
        for name in ("job", "model", "training", "validation", "checkpoint", "parallelism"):
            sections.pop(name, None)
        for name, config in OURS.items():
            made = config(**sections.pop(name, {}))
            check_config(made) if isinstance(made, TeacherConfig) else made.validate()
        assert not sections
