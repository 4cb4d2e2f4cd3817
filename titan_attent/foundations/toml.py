"""Writes configurations as TOML."""

import json
import re
from typing import Any


def to_toml(config: dict[str, dict[str, Any]]) -> str:
    """The TOML text of sections whose values are strings, numbers, booleans, lists and tables of them."""
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key} = {_value(value)}\n" for key, value in section.items())
        for name, section in config.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)  # JSON and TOML write these types the same way


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else json.dumps(key)
