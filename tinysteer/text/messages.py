"""Conversations: what a message may hold, what may not stand in it, and an answer that goes on."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

Prompt = str | Sequence[Mapping[str, Any]]  # a user's message, or a whole conversation
BEGUN = "<<tinysteer goes on here>> "  # behind an answer's beginning; a template may trim the space
STRANGERS = ("warn", "allow", "refuse")


class Form(TypedDict, total=False):
    """How prompts become tokens. See FORM for what is left out."""

    chat: bool  # put prompts into the model's chat template; False: take them as they are
    continue_final: bool  # conversations end with the beginning of the assistant's answer
    special_tokens: str  # in a message's text: "warn", "allow", or "refuse" (text of strangers)
    template_variables: Mapping[str, Any] | None  # what a chat template may use besides


FORM: Form = {
    "chat": True,
    "continue_final": False,
    "special_tokens": "warn",
    "template_variables": None,
}


def check_form(form: Form) -> Form:
    """With what is left out. ValueError for other names and values."""
    if unknown := sorted({*form} - {*FORM}):
        raise ValueError(f"{unknown[0]} is not one of {', '.join(FORM)}")
    whole: Form = {**FORM, **form}
    for name in ("chat", "continue_final"):
        if not isinstance(whole[name], bool):  # type: ignore[literal-required]
            raise ValueError(f"{name} is {whole[name]!r:.40}; it must be True or False")  # type: ignore[literal-required]
    if whole["special_tokens"] not in STRANGERS:
        raise ValueError(f"special_tokens is {whole['special_tokens']!r:.40}: one of {STRANGERS}")
    if whole["continue_final"] and not whole["chat"]:
        raise ValueError("continue_final needs the chat template: leave out chat=False")
    variables = whole["template_variables"]
    if variables is not None and not (
        isinstance(variables, Mapping) and all(isinstance(name, str) for name in variables)
    ):
        raise ValueError("template_variables is a dict of names and what they stand for")
    return whole


def read_messages(prompt: Prompt, special: Sequence[str], form: Form) -> list[dict[str, Any]]:
    """A prompt as messages whose contents are text, parts of text joined. ValueError.

    special: texts of special tokens, which a role may not hold, and a content as `form` has it.
    """
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    messages = [read_message(i, message) for i, message in enumerate(given)]
    for i, message in enumerate(messages):
        if any(token in message["role"] for token in special):
            raise ValueError(f"message {i}: its role is {message['role']!r:.60}, a special token")
        strange = [token for token in special if token in message["content"]]
        if not strange or form["special_tokens"] == "allow":
            continue
        says = f"message {i} holds {strange[0]!r}, which is a special token of this model"
        if form["special_tokens"] == "refuse":
            raise ValueError(says)
        warnings.warn(f"{says}, not text: see special_tokens=", stacklevel=6)
    final = messages[-1]["role"] == "assistant"
    if final and not form["continue_final"]:
        raise ValueError(
            "the conversation ends with an assistant's message: continue_final=True goes on with "
            "it, and without it the last message is the user's"
        )
    if form["continue_final"] and not final:
        raise ValueError("continue_final needs conversations that end with an assistant's message")
    return messages


def read_message(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"message {i}: its role is {role!r:.60}, not a text such as 'user'")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if content and all(isinstance(part, str) for part in parts):
            content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"message {i}: its content is {content!r:.60}, not text or parts of text")
    return {**message, "content": content}


def cut_at_end(text: str) -> str:
    """What a template made of a begun answer with BEGUN behind it -> the text up to there."""
    at = text.rfind(BEGUN.strip())
    if at < 0:
        raise ValueError("the chat template leaves the begun answer out: it cannot be continued")
    kept = text[at : at + len(BEGUN)] == BEGUN  # else a trimmed message's end goes too
    return text[:at] if kept else text[:at].rstrip()
