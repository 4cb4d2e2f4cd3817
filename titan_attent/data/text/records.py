"""The text in a record: of one key or several, of a template, of a prompt and its completion, or of a conversation.

Of a prompt and its completion, only the completion and the eos count as labels. Of a conversation, the turns of the
assistant count: their content and the end of the turn, but not the header in front of them. The eos counts if the last
turn is the assistant's. So a document is a list of segments, each of which counts or does not.

The tokenizer encodes every segment by itself. So a token never covers the border of two segments, and the mask is
exact: a prompt has the same ids alone, as at inference, and with any completion. Prompt and completion are not changed
and nothing is put between them: a space between them must be in the data, or in a template (text_template.py), whose
text before the completion belongs to the prompt, and after it to the completion.

The text of a template is ordinary text. Only if the tokenizer has a special token of the same text (``<|im_start|>``)
does the template use it; the same text within a message stays ordinary text.

Cost: one copy of the text of a document in memory.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from titan_attent.data.io.bad import NO_STRING, NO_TEXT, Bad
from titan_attent.data.text.text_template import TEMPLATE, TextTemplate, joined_keys, parse_template

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
    """The keys of a record, or columns of a table, that hold the text; and what the text becomes.

    Attributes:
        keys: by what they hold: ("text",), ("prompt", "completion") or ("messages",); with a text template nothing or
            ("completion",).
        template: a name in ``CHAT_TEMPLATES``, for messages.
        text_template: the text, of several keys; None for that of the key itself.
        by_source: the records of the sources with a text template of their own.
        list_key: the key of the list of records in a .json file that is one object; "" for none.
    """

    keys: dict[str, str]
    template: str = ""
    text_template: TextTemplate | None = None
    by_source: dict[str, "Records"] = field(default_factory=dict)
    list_key: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.keys.values()) if self.text_template is None else self.text_template.keys

    @property
    def has_mask(self) -> bool:
        """Whether some tokens do not count as labels."""
        return "completion" in self.keys or "messages" in self.keys

    @property
    def needs_keys(self) -> bool:
        """Whether a text without keys cannot be a document."""
        return self.has_mask or (self.text_template is not None and self.text_template.option == TEMPLATE)

    def of(self, source: str) -> "Records":
        """The records of a data source."""
        return self.by_source.get(source, self)

    def check_sources(self, sources: Collection[str]) -> None:
        """ValueError unless every template is that of one of ``sources``, and each of them has keys or a template."""
        shown = ", ".join(dict.fromkeys(sources))
        if unknown := [source for source in self.by_source if source not in sources]:
            raise ValueError(
                f"--template {unknown[0]}=...: no input has this source; the sources are {shown}. A template for all "
                "that begins so is given once for each of them, with its name in front"
            )
        without = [source for source in sources if source not in self.by_source]
        if without and tuple(self.keys) == ("completion",) and self.text_template is None:
            raise ValueError(
                f"the source {without[0]!r} has no --template, and no --prompt-key is given; give one of them"
            )

    def arguments(self) -> dict[str, Any]:
        """The arguments of the writer that a resumed run must share."""
        arguments: dict[str, Any] = {f"{noun}_key": key for noun, key in self.keys.items()}
        if self.template:
            arguments["chat_template"] = self.template
        if self.text_template is not None:
            arguments["text_template"] = list(self.text_template.parts)
        for source, records in self.by_source.items():
            assert records.text_template is not None
            arguments[f"template of {source}"] = list(records.text_template.parts)
        return arguments | ({"records_key": self.list_key} if self.list_key else {})

    def missing(self, names: Collection[Any], *, where: str, kind: str) -> Bad | None:
        """The first key that is not among ``names``; None if none is missing.

        Args:
            names: the names of the keys or columns of the input.
            kind: "key" or "column".
        """
        for key in self.names:
            if key not in names:
                shown = ", ".join([repr(name)[:80] for name in names][:40])
                option = self._option_of(key)
                noun = option.removeprefix("--").removesuffix("-key")
                fix = f"select the {noun} with {option}, one of {shown}"
                if option == TEMPLATE:
                    fix = f"correct the {TEMPLATE}, which may name {shown}"
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
        for key, value in zip(self.names, values, strict=True):
            if not isinstance(value, str):
                problem = f"{key!r} is {type(value).__name__}, not a string"
                fix = f"{FIX}, or choose another {self._option_of(key)}"
                return Bad(where, NO_TEXT if value is None else NO_STRING, problem, fix)
        if self.text_template is None and not self.has_mask:
            return values[0]
        by_key: Mapping[str, str] = dict(zip(self.names, values, strict=True))
        if self.text_template is not None and not self.has_mask:
            return self.text_template.filled(by_key)
        key = self.keys["completion"]
        if not by_key[key].strip():
            return Bad(where, NO_COMPLETION, f"{key!r} is empty or only white space", FIX)
        if self.text_template is None:
            return Segment(by_key[self.keys["prompt"]], False), Segment(by_key[key], True)
        prompt, completion = self.text_template.filled_halves(by_key, at=key)
        return Segment(prompt, False), Segment(completion, True)

    def _option_of(self, key: str) -> str:
        """The option that names ``key``."""
        if self.text_template is not None:
            return self.text_template.option
        return next(f"--{noun}-key" for noun, one in self.keys.items() if one == key)

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
    text_key: str | Sequence[str] | None = None,
    prompt_key: str | None = None,
    completion_key: str | None = None,
    messages_key: str | None = None,
    chat_template: str | None = None,
    templates: Mapping[str, str] | None = None,
    records_key: str | None = None,
) -> Records:
    """The records of the writer's options; ValueError if the options contradict each other.

    Args:
        text_key: None for "text", if no other key is given. The values of several are joined, a line end between them.
        chat_template: for messages; None for ``DEFAULT_TEMPLATE``.
        templates: source -> template of its text; the source "" stands for all others.
        records_key: the key of the list of records in a .json file that is one object.
    """
    templates = dict(templates or {})
    prompt = {"--prompt-key": prompt_key, "--completion-key": completion_key}
    groups: list[dict[str, Any]] = [{"--text-key": text_key}, prompt, {"--messages-key": messages_key}]
    given = [[option for option, key in group.items() if key is not None] for group in groups]
    used = [options for options in given if options]
    if len(used) > 1:
        raise ValueError(
            f"{used[0][0]} and {used[1][0]} exclude each other: a record holds one text, a prompt with its completion, "
            "or messages; give the keys of one of them"
        )
    if templates and messages_key is not None:
        raise ValueError(
            f"{TEMPLATE} and --messages-key exclude each other: messages have a --chat-template; give one of them"
        )
    if "" in templates and text_key is not None:
        raise ValueError(
            f"--text-key and {TEMPLATE} exclude each other: a template names its keys; leave out --text-key, or write "
            f"{TEMPLATE} NAME=... for one source"
        )
    if len(given[1]) == 1 and not (templates and completion_key is not None):
        absent = next(option for option in prompt if option not in given[1])
        raise ValueError(
            f"{given[1][0]} is given without {absent}; give both, or --text-key for texts without a prompt"
        )
    if chat_template is not None and messages_key is None:
        raise ValueError("--chat-template is given without --messages-key; it needs the key of the messages")
    if prompt_key is not None and prompt_key == completion_key:
        raise ValueError(f"--prompt-key and --completion-key are both {prompt_key!r}; give two keys")
    records = _default_records(text_key, prompt_key, completion_key, messages_key, chat_template)
    by_source = {source: _templated(text, prompt_key, completion_key) for source, text in templates.items()}
    records = by_source.pop("", records)
    list_key = records_key or ""
    by_source = {source: replace(one, list_key=list_key) for source, one in by_source.items()}
    return replace(records, by_source=by_source, list_key=list_key)


def _default_records(
    text_key: str | Sequence[str] | None,
    prompt_key: str | None,
    completion_key: str | None,
    messages_key: str | None,
    chat_template: str | None,
) -> Records:
    """The records of sources without a template."""
    if messages_key is not None:
        template = DEFAULT_TEMPLATE if chat_template is None else chat_template
        if template not in CHAT_TEMPLATES:
            raise ValueError(f"--chat-template {template!r} is unknown; choose one of {', '.join(CHAT_TEMPLATES)}")
        return Records({"messages": messages_key}, template)
    if completion_key is not None:
        return Records(({"prompt": prompt_key} if prompt_key is not None else {}) | {"completion": completion_key})
    keys = [text_key] if isinstance(text_key, str) else list(text_key or ["text"])
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"--text-key {repeated[0]!r} is given twice; give it once")
    return Records({"text": keys[0]}) if len(keys) == 1 else Records({}, text_template=joined_keys(keys))


def _templated(text: str, prompt_key: str | None, completion_key: str | None) -> Records:
    template = parse_template(text)
    for option, key in (("--prompt-key", prompt_key), ("--completion-key", completion_key)):
        if key is not None and template.parts[1::2].count(key) != 1:
            raise ValueError(f"{TEMPLATE} {text!r}: {option} is {key!r}; name {{{key}}} once in the template")
    return Records({} if completion_key is None else {"completion": completion_key}, text_template=template)
