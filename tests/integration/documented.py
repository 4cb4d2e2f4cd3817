"""The commands that README.md and the guide show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "guide"


def commands_of(text: str) -> list[list[str]]:
    """The words of the commands in the bash blocks of ``text``, with loops of the shell unrolled."""
    found = []
    for block in re.findall(r"^ *```bash\n(.*?)```", text, flags=re.S | re.M):
        unrolled = re.sub(r"for name in (.*?); do\n(.*?)done\n", _unrolled, block, flags=re.S).replace("\\\n", " ")
        found += [words for line in unrolled.splitlines() if (words := shlex.split(line, comments=True))]
    return found


def _unrolled(loop: re.Match[str]) -> str:
    return "".join(loop[2].replace("$name", name) for name in loop[1].split())


def module_of(command: list[str]) -> str:
    """The module that ``python -m`` or ``torchrun -m`` runs; "" for other commands."""
    return command[command.index("-m") + 1] if "-m" in command else ""


def arguments_of(command: list[str]) -> list[str]:
    return command[command.index("-m") + 2 :]
