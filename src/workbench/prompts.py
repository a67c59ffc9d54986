"""Prompts as a base reads them: its chat template where it has one, and cut to a length where that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from workbench.errors import BaseError, TaskError

if TYPE_CHECKING:
    from workbench.base import Base

__all__ = ["Prompt", "render", "tokenise", "turn_end"]

Prompt = (
    str | Sequence[Mapping[str, str]]
)  # a text, or a chat's turns: {"role": "user" or "assistant", "content": text}
_DAY = {
    "%d": "26",
    "%b": "Jul",
    "%B": "July",
    "%m": "07",
    "%Y": "2024",
}  # every day's date, for templates that say today's


def tokenise(base: Base, prompts: Sequence[Prompt], reserve: Sequence[int]) -> list[list[int]]:
    """Prompts' token ids, special tokens included, as the model reads them before answers of `reserve` tokens.

    In a chat (`Base.chat`) a text is the user's turn and the answer is the assistant's, which the template opens. Without
    one, a stop token that the tokenizer puts behind every text (T5's) stays at an encoder's prompts, and is left out where
    the answer follows in the same row. Under `Base.max_length` a prompt that leaves no room for its answer is cut: its
    oldest demonstrations, then the beginning of its text, so that the question's end stays.

    Raises:
        TaskError: a prompt longer than the model can read, where no `max_length` was given; one that nothing is left of;
            turns for a base that has no chat.
        BaseError: a chat template that fails.
    """
    ids = _read(base, prompts)
    most = base.max_length or base.positions
    for i, prompt in enumerate(prompts if most else ()):
        room = most - (reserve[i] if base.decoder_start is None else 0)
        if len(ids[i]) <= room:
            continue
        beside = f" beside an answer of {reserve[i]}" if base.decoder_start is None else ""
        if base.max_length is None:
            raise TaskError(
                f"a prompt of {len(ids[i])} tokens, ending in {_last(prompt)[-60:]!r}, is longer than the {max(room, 0)} that "
                f"{base.name} can read{beside}; shorten it, or cut prompts from the left: Base.load(…, max_length={most})"
            )
        ids[i] = _cut(base, prompt, room)
        if not ids[i]:
            raise TaskError(
                f"max_length={most} leaves {max(room, 0)} tokens for a prompt{beside}, too few for any of "
                f"{_last(prompt)[-60:]!r}; raise it, or lower the task's max_new_tokens"
            )
    return ids


def render(base: Base, prompt: Prompt, *, answered: bool = False) -> str:
    """The text that the chat template makes of a prompt, the assistant's turn opened (or, if `answered`, closed)."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    tokenizer, opened = base.tokenizer, not answered
    told = {"tokenize": False, "enable_thinking": False}  # the answer comes at once, without reasoning before it
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:  # results do not depend on the day
            date = "".join(f" | replace('{form}', '{text}')" for form, text in _DAY.items())
            template = "{% macro strftime_now(form) %}{{ form" + date + " }}{% endmacro %}{{ '' }}" + template
        return tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=opened, **told)
    except (TemplateError, TypeError, ValueError) as error:
        raise BaseError(f"the chat template of {base.name} fails: {error}; chat=False leaves it out") from error


def turn_end(base: Base) -> int | None:
    """The token with which the chat template ends the assistant's turn; None where it has none, or takes one turn only."""
    marked = "workbench"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marked}]
    try:
        behind = render(base, turns, answered=True).rpartition(marked)[2]
    except BaseError:
        return None
    known = set(base.tokenizer.added_tokens_decoder) | set(base.tokenizer.all_special_ids)
    ids = base.tokenizer([behind], add_special_tokens=False)["input_ids"][0] if behind else []
    return next((i for i in ids if i in known), None)


def _read(base: Base, prompts: Sequence[Prompt]) -> list[list[int]]:
    quiet = {"return_attention_mask": False, "verbose": False}  # lengths are checked here, so no warning of them
    if base.chat:
        texts = [render(base, prompt) for prompt in prompts]
        return base.tokenizer(texts, add_special_tokens=False, **quiet)["input_ids"]
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise TaskError(f"{base.name} is used without a chat template, and a prompt came as turns; give a text")
    heads = base.tokenizer(list(prompts), **quiet)["input_ids"]
    eos = base.tokenizer.eos_token_id
    if base.decoder_start is not None or eos is None:
        return heads
    closed = [
        bool(ids) and ids[-1] == eos and not p.endswith(base.tokenizer.eos_token)
        for p, ids in zip(prompts, heads, strict=True)
    ]
    return [ids[:-1] if cut else ids for ids, cut in zip(heads, closed, strict=True)]


def _last(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _cut(base: Base, prompt: Prompt, room: int) -> list[int]:
    """At most `room` ids: without the first turns, then without the beginning of the last text; [] if nothing fits."""
    while not isinstance(prompt, str) and len(prompt) > 2:
        prompt = prompt[2:]
        (tried,) = _read(base, [prompt])
        if len(tried) <= room:
            return tried
    last, ids = _last(prompt), []
    low, high = 0, len(last)  # the text from `low` on is too long; from `high` on it fits, if any does
    while low + 1 < high:
        middle = (low + high) // 2
        (tried,) = _read(base, [last[middle:]])
        if len(tried) <= room:
            high, ids = middle, tried
        else:
            low = middle
    return ids
