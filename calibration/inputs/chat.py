"""Chats as text: lists of messages through a chat template, as the model sees them when it is served.

A message is {role, content}, or {from, value} as ShareGPT writes it. Content is a text or a list of parts, of which
those with a text count.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

MESSAGE_KEYS = ({"role", "content"}, {"from", "value"})
# ShareGPT's roles -> those of templates. Other roles keep their name, because the template knows which it takes.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
# The day that Llama's template takes as a default. Templates that print the day would make other samples tomorrow.
DAY = datetime(2024, 7, 26)

Messages = list[dict[str, Any]]


def read_template(dataset: str, column: str, tokenizer: PreTrainedTokenizerBase, file: str | None) -> str:
    """The Jinja text of `file`, else of the tokenizer. SmoothQuantError: there is none, or it cannot be read."""
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "check the path, and that the file is in UTF-8"
            raise SmoothQuantError("--chat-template", "a file with a Jinja template", error, fix) from error
    fix = "give one with --chat-template FILE, or name a column of texts with --text-column"
    where = f"{dataset}: the chats of {column!r}"
    if getattr(tokenizer, "chat_template", None) is None:
        raise SmoothQuantError(where, "a tokenizer with a chat template", "one without", fix)
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of which is the default
        raise SmoothQuantError(where, "a tokenizer with one chat template", error, fix) from error


def read_messages(row: Any, where: str) -> tuple[Messages, int]:
    """(`row` as templates take it, number of parts that are no text). SmoothQuantError: it is no list of messages."""
    expected = "a message with a role and content"
    fix = "correct or remove the row, or name another column with --text-column"
    if not isinstance(row, list):
        raise SmoothQuantError(where, "a text or a list of messages", f"a value of type {type(row).__name__}", fix)
    messages, left_out = [], 0
    for number, message in enumerate(row, 1):
        spot = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise SmoothQuantError(spot, expected, f"a value of type {type(message).__name__}", fix)
        # A table gives every message the keys of all; those without a value are not the message's own.
        message = _without_none(message)
        role = message.pop("role", None) or message.pop("from", None)
        content = message.pop("content", message.pop("value", None))
        if isinstance(content, list):
            texts = [part if isinstance(part, str) else _text(part) for part in content]
            left_out += texts.count(None)
            content = "".join(text for text in texts if text is not None)
        if not isinstance(role, str):
            raise SmoothQuantError(spot, expected, "no role" if role is None else f"the role {role!r}", fix)
        if content is None and not message.get("tool_calls"):
            raise SmoothQuantError(spot, expected, "no content", fix)
        if not isinstance(content, str | None):
            raise SmoothQuantError(spot, expected, f"content of type {type(content).__name__}", fix)
        messages.append({"role": ROLES.get(role, role), "content": content, **message})
    return messages, left_out


def has_text(messages: Messages) -> bool:
    return any((message["content"] or "").strip() or message.get("tool_calls") for message in messages)


def render(tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, where: str) -> str:
    """`messages` as `template` writes them, special tokens included. SmoothQuantError: it refuses them."""
    # The longest word, because templates trim and quote texts, and some leave a message out.
    words = [max(text.split(), key=len) for m in messages if (text := m["content"] or "").strip()]
    for form in _forms(messages):
        try:
            text = tokenizer.apply_chat_template(
                form, chat_template=template, tokenize=False, strftime_now=DAY.strftime
            )
        except TemplateSyntaxError as error:
            fix = "correct it, or give another one with --chat-template FILE"
            raise SmoothQuantError("the chat template", "Jinja", f"{error} (line {error.lineno})", fix) from error
        except Exception as error:  # of any kind, because a template is a program of somebody else
            fix = "correct or remove the row, or give another template with --chat-template FILE"
            raise SmoothQuantError(where, "messages that the chat template takes", error, fix) from error
        if not words or any(word in text for word in words):
            return text
    fix = "give another template with --chat-template FILE"
    raise SmoothQuantError(where, "a chat template that writes the messages", "none of their text", fix)


def _forms(messages: Messages) -> Iterator[Messages]:
    """Content as text; then as a list of one part, because templates of vision models pass over a text."""
    yield messages
    yield [m | {"content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in messages]


def _text(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
