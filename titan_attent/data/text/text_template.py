r"""A template of the text of a record: ``{title}\n{text}``, where a name in braces stands for the value of that key.

``{{`` and ``}}`` stand for braces. Values are put in as they are, so that braces in them mean nothing. On the command
line ``\n``, ``\t`` and ``\\`` stand for a line end, a tab and a backslash.

Cost: one copy of the text of a document.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TEMPLATE = "--template"
"""The option of a template."""
_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}


class TextTemplate(NamedTuple):
    """Texts and keys in turn: a text (which may be empty), a key, a text, ..., a text.

    Attributes:
        option: what it was given by, for messages.
    """

    parts: tuple[str, ...]
    option: str = TEMPLATE

    @property
    def keys(self) -> tuple[str, ...]:
        """The different keys, in the order of their first places."""
        return tuple(dict.fromkeys(self.parts[1::2]))

    def filled(self, values: Mapping[str, str]) -> str:
        """The text of a record with ``values`` by key."""
        return _filled(self.parts, values)

    def filled_halves(self, values: Mapping[str, str], *, at: str) -> tuple[str, str]:
        """The text before the one place of the key ``at``, and the rest."""
        place = 1 + 2 * self.parts[1::2].index(at)
        return _filled(self.parts[:place], values), values[at] + _filled(self.parts[place + 1 :], values)


def _filled(parts: Sequence[str], values: Mapping[str, str]) -> str:
    return "".join(values[part] if number % 2 else part for number, part in enumerate(parts))


def parse_template(text: str) -> TextTemplate:
    """The template ``text``; ValueError if a brace has no other, or if it has no key."""
    parts, end = [""], 0
    for match in _PART.finditer(text):
        parts[-1] += text[end : match.start()]
        end = match.end()
        if match[0] in ("{{", "}}"):
            parts[-1] += match[0][0]
        elif match[1] is None:
            raise ValueError(
                f"{TEMPLATE} {text!r}: the {match[0]!r} at character {match.start()} has no other brace around a key; "
                f"write {2 * match[0]!r} for a brace"
            )
        else:
            parts += [match[1], ""]
    parts[-1] += text[end:]
    if len(parts) == 1:
        raise ValueError(f"{TEMPLATE} {text!r}: names no key; write keys in braces, such as '{{title}}\\n{{text}}'")
    return TextTemplate(tuple(parts))


def joined_keys(keys: Sequence[str]) -> TextTemplate:
    """The values of several text keys, one below the other."""
    parts = [""]
    for key in keys:
        parts += [key, "\n"]
    return TextTemplate((*parts[:-1], ""), "--text-key")


def unescaped(text: str) -> str:
    """``text`` from a command line, with its escapes replaced; other backslashes stay."""
    return re.sub(r"\\[nt\\]", lambda match: _ESCAPES[match[0]], text)
