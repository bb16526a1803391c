"""Turn text into tokens and back: the tokenizer, the chat template, and text while it is made.

tokenizers and jinja2 are imported when first used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from qc.errors import ArtifactError, InputError
from qc.runtime.strict_json import parse_object

__all__ = ["Message", "TextModel", "stream_pieces"]

Message = Mapping[str, Any]
"""One turn of a chat: {"role": "user", "content": "..."}."""

_UNFINISHED = "\ufffd"
"""What a tokenizer decodes the bytes of half a character to."""


class TextModel:
    """Encode and decode with the files that a Hugging Face model brings.

    `files` holds tokenizer.json and, if there are any, tokenizer_config.json and
    chat_template.jinja.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # noqa: BLE001 - what tokenizers raises for malformed files
            raise ArtifactError(f"tokenizer.json cannot be read: {error}") from None
        config_bytes = files.get("tokenizer_config.json")
        config = parse_object(config_bytes, "tokenizer_config.json") if config_bytes else {}
        self._template_text = _find_template(files.get("chat_template.jinja"), config)
        self._special_tokens = {
            name: token
            for name, content in config.items()
            if name.endswith("_token")
            and isinstance(
                token := content.get("content") if isinstance(content, dict) else content, str
            )
        }

    @property
    def has_chat_template(self) -> bool:
        return self._template_text is not None

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Return token ids, with the model's own start and end marks unless told otherwise."""
        return list(self.tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def decode(self, ids: Sequence[int], *, special_tokens: bool = False) -> str:
        """Return the text of token ids."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=not special_tokens)
        return text

    def encode_chat(self, messages: str | Sequence[Message]) -> list[int]:
        """Render the chat template, ready for the answer, and return its token ids.

        A plain text is one message of the user. Raises InputError without a template.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        # The template writes the special tokens itself.
        return self.encode(self.render_chat(messages), special_tokens=False)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the chat template makes of `messages`."""
        if self._template_text is None:
            raise InputError("this model has no chat template: use a plain prompt")
        from jinja2 import TemplateError

        try:
            template = _chat_environment().from_string(self._template_text)
            text: str = template.render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens
            )
            return text
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from None


def _find_template(separate: bytes | None, config: Mapping[str, Any]) -> str | None:
    """Return the chat template: its own file comes before the tokenizer's configuration."""
    if separate is not None:
        return separate.decode("utf-8", errors="replace")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _chat_environment() -> Any:
    """Make the environment that chat templates are written for, sandboxed."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Read {% generation %}, which marks the assistant's part for training, as its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def stream_pieces(
    model: TextModel, ids: Iterable[int], prompt: Sequence[int] = ()
) -> Iterator[str]:
    """Yield text while tokens arrive; joined, it is their decoding. Never yields half a character,
    unless the tokens end there: as U+FFFD.

    The last tokens of the prompt are decoded along, since some tokenizers drop a space at the
    start.
    """
    window = list(prompt[-4:])
    shown = len(window)  # tokens of the window whose text has been yielded
    for token in ids:
        window.append(token)
        old, new = model.decode(window[:shown]), model.decode(window)
        if len(new) <= len(old) or new.endswith(_UNFINISHED):
            continue
        yield new[len(old) :]
        window = window[shown:]
        shown = len(window)
    rest = model.decode(window)[len(model.decode(window[:shown])) :]
    if rest:
        yield rest
