"""Configurations that the package itself writes."""

import json
from typing import Any


def to_toml(config: dict[str, dict[str, Any]]) -> str:
    """Sections of strings, numbers and booleans as TOML."""
    # JSON's strings, numbers and booleans are TOML's.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in config.items()
    )
