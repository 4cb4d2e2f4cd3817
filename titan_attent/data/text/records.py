"""The text in a record: of one key, of a prompt and its completion, or of a conversation in a chat template.

Of a prompt and its completion, only the completion and the eos count as labels. Of a conversation, the turns of the
assistant count: their content and the end of the turn, but not the header in front of them. The eos counts if the last
turn is the assistant's. So a document is a list of segments, each of which counts or does not.

The tokenizer encodes every segment by itself. So a token never covers the border of two segments, and the mask is
exact: a prompt has the same ids alone, as at inference, and with any completion. Prompt and completion are not changed
and nothing is put between them: a space between them must be in the data.

The text of a template is ordinary text. Only if the tokenizer has a special token of the same text (``<|im_start|>``)
does the template use it; the same text within a message stays ordinary text.

Cost: one copy of the text of a document in memory.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from titan_attent.data.io.bad import NO_STRING, NO_TEXT, Bad

ASSISTANT = "assistant"
"""The role whose turns count."""
NO_COMPLETION, NOT_MESSAGES, NO_ASSISTANT = "empty completion", "not messages", "without an assistant's turn"
"""Reasons for a record: completion or assistant's turn without text; no list of {"role", "content"}; no turn counts."""
FIX = "fix or remove the record"


class Segment(NamedTuple):
    """A part of a document that is encoded by itself.

    Attributes:
        counts: the loss of its tokens as labels counts.
        markup: text of the template, which may be a special token of the tokenizer.
    """

    text: str
    counts: bool
    markup: bool = False


class ChatTemplate(NamedTuple):
    """The text around the turns of a conversation; ``{role}`` in the header is the role of the turn."""

    header: str
    footer: str
    separator: str = ""


CHAT_TEMPLATES = {
    "plain": ChatTemplate("{role}:\n", "\n\n"),
    "chatml": ChatTemplate("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": ChatTemplate("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
}
"""By the names of ``--chat-template``. Sources: https://github.com/openai/openai-python/blob/v0.27.0/chatml.md and
https://github.com/meta-llama/llama3/blob/main/llama/tokenizer.py (without ``<|begin_of_text|>``)."""
DEFAULT_TEMPLATE = "plain"

Content = str | tuple[Segment, ...]


@dataclass(frozen=True)
class Records:
    """The keys of a record, or columns of a parquet file, that hold the text; and what the text becomes.

    Attributes:
        keys: by what they hold: ("text",), ("prompt", "completion") or ("messages",).
        template: a name in ``CHAT_TEMPLATES``, for messages.
    """

    keys: dict[str, str]
    template: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.keys.values())

    @property
    def has_mask(self) -> bool:
        """Whether some tokens do not count as labels."""
        return "text" not in self.keys

    def arguments(self) -> dict[str, str]:
        """The arguments of the writer that a resumed run must share."""
        arguments = {f"{noun}_key": key for noun, key in self.keys.items()}
        return arguments | ({"chat_template": self.template} if self.template else {})

    def check_eos(self, tokenizer: dict[str, Any]) -> None:
        """ValueError if the template holds the eos of the tokenizer with this ``info``: an eos ends a document."""
        template = CHAT_TEMPLATES.get(self.template, ())
        special = tokenizer["special_tokens"].items()
        for eos in (text for text, number in special if number == tokenizer["eos_id"]):
            if any(eos in part for part in template):
                others = ", ".join([text for text, _ in special if not any(text in part for part in template)][:20])
                raise ValueError(
                    f"--chat-template {self.template} writes {eos} within a conversation, and it is the eos of the "
                    f"tokenizer, which only ends documents; name another with --eos: {others or 'an id'}"
                )

    def missing(self, names: Collection[Any], *, where: str, kind: str) -> Bad | None:
        """The first key that is not among ``names``; None if none is missing.

        Args:
            names: the names of the keys or columns of the input.
            kind: "key" or "column".
        """
        for noun, key in self.keys.items():
            if key not in names:
                shown = ", ".join([repr(name)[:80] for name in names][:40])
                fix = f"select the {noun} with --{noun}-key, one of {shown}"
                return Bad(where, NO_TEXT, f"no {kind} {key!r}", fix)
        return None

    def unusable_columns(self, names: Sequence[str], *, where: str) -> Bad | None:
        """Why a table with columns ``names`` cannot be read: one of the columns is missing, or appears twice."""
        if repeated := [key for key in self.names if names.count(key) > 1]:
            problem, fix = f"the column {repeated[0]!r} appears twice", "write the file again with one of them"
            return Bad(where, NO_TEXT, problem, fix)
        return self.missing(names, where=where, kind="column")

    def content(self, values: Sequence[Any], *, where: str) -> Content | Bad:
        """The content of a record with ``values``, one per key."""
        if "messages" in self.keys:
            return self._conversation(values[0], where=where)
        for (noun, key), value in zip(self.keys.items(), values, strict=True):
            if not isinstance(value, str):
                problem = f"{key!r} is {type(value).__name__}, not a string"
                fix = f"{FIX}, or choose another --{noun}-key"
                return Bad(where, NO_TEXT if value is None else NO_STRING, problem, fix)
        if not self.has_mask:
            return values[0]
        prompt, completion = values
        if not completion.strip():
            return Bad(where, NO_COMPLETION, f"{self.keys['completion']!r} is empty or only white space", FIX)
        return Segment(prompt, False), Segment(completion, True)

    def _conversation(self, messages: Any, *, where: str) -> Content | Bad:
        key = self.keys["messages"]
        if not isinstance(messages, list):
            fix = f"{FIX}, or choose another --messages-key"
            problem = f"{key!r} is {type(messages).__name__}, not a list of messages"
            return Bad(where, NO_TEXT if messages is None else NOT_MESSAGES, problem, fix)
        template, segments = CHAT_TEMPLATES[self.template], list[Segment]()
        for number, message in enumerate(messages, start=1):
            name = f"message {number} of {key!r}"
            role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
            if not isinstance(role, str) or not isinstance(content, str):
                types = type(message).__name__
                if isinstance(message, dict):
                    types = f"an object with {type(role).__name__} and {type(content).__name__}"
                problem = f"{name} is {types} where an object with the strings 'role' and 'content' is expected"
                return Bad(where, NOT_MESSAGES, problem, FIX)
            # The role becomes part of the template's text, which may hold special tokens.
            if not re.fullmatch("[A-Za-z0-9_.-]{1,64}", role):
                problem = f"{name} has the role {role[:80]!r}; a role has letters, digits, '_', '.' and '-'"
                return Bad(where, NOT_MESSAGES, problem, FIX)
            counts = role == ASSISTANT
            if counts and not content.strip():
                return Bad(where, NO_COMPLETION, f"{name}, an assistant's turn, is empty or only white space", FIX)
            header = (template.separator if segments else "") + template.header.replace("{role}", role)
            segments += [Segment(header, False, True), Segment(content, counts), Segment(template.footer, counts, True)]
        if not any(segment.counts for segment in segments):
            problem = f"{key!r} has {len(messages)} messages, none of the role {ASSISTANT!r}"
            return Bad(where, NO_ASSISTANT, problem, FIX)
        return tuple(segments)


TEXT_RECORDS = Records({"text": "text"})
"""Records with the key ``text``."""


def make_records(
    *,
    text_key: str | None = None,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    messages_key: str | None = None,
    chat_template: str | None = None,
) -> Records:
    """The records of the writer's options; ValueError if the options contradict each other.

    Args:
        text_key: None for "text", if no other key is given.
        chat_template: for messages; None for ``DEFAULT_TEMPLATE``.
    """
    prompt = {"--prompt-key": prompt_key, "--completion-key": completion_key}
    groups = [{"--text-key": text_key}, prompt, {"--messages-key": messages_key}]
    given = [[option for option, key in group.items() if key is not None] for group in groups]
    used = [options for options in given if options]
    if len(used) > 1:
        raise ValueError(
            f"{used[0][0]} and {used[1][0]} exclude each other: a record holds one text, a prompt with its completion, "
            "or messages; give the keys of one of them"
        )
    if len(given[1]) == 1:
        absent = next(option for option in prompt if option not in given[1])
        raise ValueError(
            f"{given[1][0]} is given without {absent}; give both, or --text-key for texts without a prompt"
        )
    if chat_template is not None and messages_key is None:
        raise ValueError("--chat-template is given without --messages-key; it needs the key of the messages")
    if messages_key is not None:
        template = DEFAULT_TEMPLATE if chat_template is None else chat_template
        if template not in CHAT_TEMPLATES:
            raise ValueError(f"--chat-template {template!r} is unknown; choose one of {', '.join(CHAT_TEMPLATES)}")
        return Records({"messages": messages_key}, template)
    if prompt_key is not None and completion_key is not None:
        if prompt_key == completion_key:
            raise ValueError(f"--prompt-key and --completion-key are both {prompt_key!r}; give two keys")
        return Records({"prompt": prompt_key, "completion": completion_key})
    return Records({"text": "text" if text_key is None else text_key})
