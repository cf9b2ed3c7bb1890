"""Chat templates: conversations as text and as token ids, with a mask of what the assistant says.

A conversation is a list of messages {"role": ..., "content": ...}. The template, Jinja in the form that `transformers`
runs, writes roles, special tokens and contents into one text; the ids are those of that text.

Two things are needed beyond the text. Which characters come from a message, so that "<|im_end|>" in what a user wrote
stays text; and which the assistant wrote, so that those alone are learnt. Both are found by rendering the
conversation once more with marks around each content (Unicode noncharacters, which no text holds). A template that
trims contents passes the marks through; one that rewrites them is found out, as its text without the marks is another.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from rlhfjax.data.pretrained_tokenizers import PretrainedTokenizer
from rlhfjax.data.tokenizer_files import read_chat_template, read_special_tokens

__all__ = [
    "CHATML",
    "ChatTemplate",
    "EncodedChat",
    "Message",
    "end_of_turn",
    "load_chat_template",
    "save_tokenizer",
]

Message = Mapping[str, Any]

# Never taken by itself: for a base model that is to learn to chat, and whose vocabulary should have its two tokens.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Noncharacters of Unicode (U+FDD0..U+FDEF), which no text that is exchanged may hold. A content's mark is its number
# in hexadecimal digits of the first sixteen between _OPEN and _MIDDLE; _CLOSE ends it.
_DIGITS = "".join(chr(0xFDD0 + i) for i in range(16))
_OPEN, _MIDDLE, _CLOSE = (chr(0xFDE0 + i) for i in range(3))
_MARKS = re.compile(f"{_OPEN}([{_DIGITS}]+){_MIDDLE}|{_CLOSE}")
_RESERVED = re.compile("[\ufdd0-\ufdef]")


class EncodedChat(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    assistant: np.ndarray  # bool [tokens]: of what the assistant says, the token that ends its turn included


class _Span(NamedTuple):
    """Characters [start, end) of a rendered text, of message `index`."""

    index: int
    start: int
    end: int


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens it may name."""

    source: str
    """Jinja, as in `chat_template.jinja`."""
    special_tokens: Mapping[str, str]
    """Role ("bos", "eos", ...) -> text; the template reads them as bos_token, eos_token, ..."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text, special tokens written out; with the opening of an assistant's turn if asked.

        ValueError for a template with a syntax error or that raises, and for messages that are none.
        """
        _check_messages(messages)
        return _render(self, messages, add_generation_prompt)

    def encode(
        self,
        tokenizer: PretrainedTokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
    ) -> EncodedChat:
        """Ids of the conversation, as `transformers` has them, and which tokens are the assistant's.

        Contents never make special tokens; the ids differ from those of `transformers` where one tries.

        What the assistant says is: what the template puts in `{% generation %}`, if it does; else its contents with
        what follows up to the end-of-turn token, that included; else, where the template rewrites contents, what each
        assistant message adds to the rendering of those before it and the generation prompt. ValueError where none
        of these holds together, and where a content holds a special token that cannot be told from the template's.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        contents = _content_spans(self, messages, add_generation_prompt, text)
        specials = _special_spans(tokenizer, messages, text, contents)
        ids, offset_N2 = tokenizer.encode_chat(text, specials)
        spans = _said_spans(self, messages, add_generation_prompt, text)
        if not spans and any(message["role"] == "assistant" for message in messages):
            ends = _turn_ends(self, tokenizer)
            if contents is None:
                spans = _prefix_spans(self, messages, text, ends)
            else:
                spans = _turn_spans(
                    messages, text, contents, [s for s in specials if text[slice(*s)] in ends]
                )
        return EncodedChat(ids, _covered(offset_N2, spans))


def load_chat_template(directory: str | Path, name: str = "default") -> ChatTemplate:
    """The chat template of a pretrained model's folder; FileNotFoundError if it has none of that name.

    No template is taken for granted: for a base model write `ChatTemplate(CHATML, tokenizer.special_tokens)`.
    """
    return ChatTemplate(read_chat_template(directory, name), read_special_tokens(directory))


def save_tokenizer(
    directory: str | Path, tokenizer: PretrainedTokenizer, template: ChatTemplate | None = None
) -> None:
    """Writes a tokenizer, and its chat template if it has one, as `load_tokenizer`, `load_chat_template` and
    `transformers` read them."""
    tokenizer.save(directory)
    if template is not None:
        (Path(directory) / "chat_template.jinja").write_text(template.source, encoding="utf-8")


def end_of_turn(template: ChatTemplate, tokenizer: PretrainedTokenizer) -> tuple[int, ...]:
    """Ids at which generation stops: the token that ends a turn in the template, and the tokenizer's `stop_ids`."""
    ends = (tokenizer.special_texts[text] for text in _turn_ends(template, tokenizer))
    return tuple(dict.fromkeys([*ends, *tokenizer.stop_ids]))


def _turn_ends(template: ChatTemplate, tokenizer: PretrainedTokenizer) -> list[str]:
    """The first special token behind an assistant's content, white space apart, in a last turn and in one before."""
    said = "OK"
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": said if role == "assistant" else "Hi"} for role in roles]
    found = []
    for talk in (messages, messages[:2]):
        behind = template.render(talk).rpartition(said)[2]
        found.append(_special_pattern(tokenizer).match(behind.lstrip()))
    return list(dict.fromkeys(match.group() for match in found if match is not None))


def _render(
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    marks: tuple[str, str] = ("", ""),
) -> str:
    """The text; `marks` stand around what is in `{% generation %}`."""
    jinja2 = _jinja2()
    names = {f"{role}_token": text for role, text in template.special_tokens.items()}
    try:
        return _compiled(template.source).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            _say=marks[0],
            _said=marks[1],
            **names,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja: {error}, line {error.lineno}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        roles = [message["role"] for message in messages]
        raise ValueError(f"the chat template refuses a conversation of roles {roles}: {error}") from error


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    """The template in the environment that `transformers` gives one; sandboxed, as it may come from anybody."""
    jinja2 = _jinja2()
    sandbox = import_module("jinja2.sandbox")
    extensions = import_module("jinja2.ext")
    nodes = import_module("jinja2.nodes")

    class Generation(extensions.Extension):
        """{% generation %}...{% endgeneration %}: its body between `_say` and `_said`, which are "" or marks."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            say, said = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("_say", "_said"))
            # A scope of its own, as where the body is a macro's.
            return nodes.Scope([say, *body, said], lineno=line)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(
        x: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.filters["tojson"] = to_json  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _jinja2() -> Any:
    if find_spec("jinja2") is None:
        raise ModuleNotFoundError('chat templates need jinja2: pip install "rlhfjax[text]"')
    return import_module("jinja2")


def _check_messages(messages: Sequence[Message]) -> None:
    if not len(messages):
        raise ValueError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ValueError(f"message {i} needs a text as its {field!r}, it has {message.get(field)!r}")
        if message["role"] == "assistant" and not message["content"].strip():
            raise ValueError(f"message {i}: the assistant says nothing; fill its content or drop the turn")
        if found := _RESERVED.search(message["content"]):
            raise ValueError(
                f"message {i} holds U+{ord(found.group()):X}, a noncharacter that marks contents here; take it out"
            )


def _marked(message: Message, index: int, core: str) -> dict[str, Any]:
    """The message with marks around `core`, which is its content or that without its outer white space."""
    content = message["content"]
    start = content.index(core)
    digits = "".join(_DIGITS[int(digit, 16)] for digit in f"{index:x}")
    around = f"{content[:start]}{_OPEN}{digits}{_MIDDLE}{core}{_CLOSE}{content[start + len(core) :]}"
    return {**message, "content": around if core else content}


def _content_spans(
    template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool, text: str
) -> list[_Span] | None:
    """Where contents lie in `text`; None for a template that rewrites them.

    Of a template that trims contents, their outer white space is left out."""
    whole = [message["content"] for message in messages]
    for cores in (whole, [content.strip() for content in whole]):
        marked = [
            _marked(message, i, core) for i, (message, core) in enumerate(zip(messages, cores, strict=True))
        ]
        try:
            spans = _mark_spans(_render(template, marked, add_generation_prompt), text)
        except ValueError:  # a template that looks into contents and does not expect marks
            continue
        if spans is not None and all(text[s.start : s.end] == cores[s.index] for s in spans):
            return spans
    return None


def _said_spans(
    template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool, text: str
) -> list[tuple[int, int]]:
    """Where in `text` the template's `{% generation %}` lies; empty if it has none."""
    marks = (_OPEN + _DIGITS[0] + _MIDDLE, _CLOSE)
    spans = _mark_spans(_render(template, messages, add_generation_prompt, marks), text)
    if spans is None:
        raise ValueError(
            "the chat template rewrites what is in its own {% generation %}; it cannot be learnt from"
        )
    return [(span.start, span.end) for span in spans]


def _mark_spans(marked: str, text: str) -> list[_Span] | None:
    """The marked spans of a text, ascending; None if it is not `text` with marks in pairs."""
    if _MARKS.sub("", marked) != text:
        return None
    spans: list[_Span] = []
    open_spans: list[tuple[int, int]] = []
    taken = 0  # characters of marks so far
    for mark in _MARKS.finditer(marked):
        place = mark.start() - taken
        taken += len(mark.group())
        if mark.group(1):
            index = int("".join(f"{_DIGITS.index(digit):x}" for digit in mark.group(1)), 16)
            open_spans.append((index, place))
        elif not open_spans:
            return None
        else:
            spans.append(_Span(*open_spans.pop(), place))
    return None if open_spans else sorted(spans, key=lambda span: span.start)


def _special_pattern(tokenizer: PretrainedTokenizer) -> re.Pattern[str]:
    """Special tokens in a text, the longest at a place, as the library finds them."""
    longest = sorted(tokenizer.special_texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)))


def _special_spans(
    tokenizer: PretrainedTokenizer, messages: Sequence[Message], text: str, contents: list[_Span] | None
) -> list[tuple[int, int]]:
    """Where the template itself wrote special tokens."""
    pattern = _special_pattern(tokenizer)
    for i, message in enumerate(messages):
        others = {field: x for field, x in message.items() if field != "content"}
        if found := pattern.search(json.dumps(others, ensure_ascii=False, default=str)):
            raise ValueError(
                f"message {i} holds the text {found.group()!r} of a special token outside its content"
            )
    if contents is None:
        for i, message in enumerate(messages):
            if found := pattern.search(message["content"]):
                raise ValueError(
                    f"message {i} holds the text {found.group()!r} of a special token, and the chat template rewrites "
                    "contents, so that it cannot be told from the template's own; take it out of the message"
                )
        return [found.span() for found in pattern.finditer(text)]
    spans: list[tuple[int, int]] = []
    start = 0
    for content in [*contents, _Span(len(messages), len(text), len(text))]:
        spans += [found.span() for found in pattern.finditer(text, start, max(start, content.start))]
        start = max(start, content.end)
    return spans


def _turn_spans(
    messages: Sequence[Message], text: str, contents: list[_Span], ends: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Each assistant's content, and the end-of-turn token with the white space before it if that comes next."""
    speakers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    if missing := sorted(speakers - {content.index for content in contents}):
        raise ValueError(f"the chat template leaves out what the assistant says in messages {missing}")
    spans = []
    for content in contents:
        if content.index in speakers:
            behind = [
                span for span in ends if span[0] >= content.end and not text[content.end : span[0]].strip()
            ]
            spans.append((content.start, behind[0][1] if behind else content.end))
    return spans


def _prefix_spans(
    template: ChatTemplate, messages: Sequence[Message], text: str, ends: list[str]
) -> list[tuple[int, int]]:
    """What each assistant message adds to the rendering of those before it, up to its end-of-turn token."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template.render(messages[:i], add_generation_prompt=True) if i else ""
        after = template.render(messages[: i + 1])
        turn = after[len(before) :]
        stops = [turn.index(end) + len(end) for end in ends if end in turn]
        after = before + turn[: min(stops, default=len(turn.rstrip()))]
        if not text.startswith(after) or not turn:
            raise ValueError(
                f"the chat template rewrites contents and earlier turns, so it cannot be told which tokens of message "
                f"{i} the assistant says; put {{% generation %}} ... {{% endgeneration %}} around them in the template"
            )
        spans.append((len(before), len(after)))
    return spans


def _covered(offset_N2: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """bool [N]: whether a token covers a character of a span; an empty token counts where it stands in one."""
    start_N, end_N = offset_N2[:, 0], np.maximum(offset_N2[:, 1], offset_N2[:, 0] + 1)
    covered_N = np.zeros(len(offset_N2), bool)
    for start, end in spans:
        covered_N |= (start_N < end) & (end_N > start)
    return covered_N
