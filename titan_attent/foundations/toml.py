"""Writes configurations as TOML."""

import json
import math
import re
from typing import Any


def to_toml(config: dict[str, dict[str, Any]]) -> str:
    """The TOML text of sections whose values are strings, numbers, booleans, lists and tables of them.

    A key whose value is None is left out: TOML has no null, and a key that is not there has its default.
    """
    return "\n".join(
        f"[{name}]\n"
        + "".join(f"{_key(key)} = {_value(value)}\n" for key, value in section.items() if value is not None)
        for name, section in config.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        items = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)  # JSON and TOML write numbers and booleans the same way


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    # TOML takes JSON's escapes, except those of two surrogates for one character; and it wants DEL escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
