"""Writes configurations as TOML."""

import json
from typing import Any


def to_toml(config: dict[str, dict[str, Any]]) -> str:
    """The TOML text of sections whose values are strings, numbers and booleans."""
    # JSON and TOML write these types the same way.
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in config.items()
    )
