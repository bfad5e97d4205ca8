"""What a model's chat template puts around one user message, as text."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cotrain.errors import TeacherError

_SENTINEL = "@@cotrain-prompt@@"
_THINKING = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "<|channel>thought": "<channel|>",
    "[THINK]": "[/THINK]",
}
# Templates that show the date of today would make other prompts tomorrow, in a resumed run.
_DATE = "2024-07-26"
_FIXED_DATE = "{%- macro strftime_now(format) -%}" + _DATE + "{%- endmacro -%}"
# What Jinja itself and the Python inside a template raise on a message that they cannot take.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


def chat_frame(tokenizer: PreTrainedTokenizerBase, system: str) -> tuple[str, str]:
    """Text before and after a user message, up to where the assistant's answer begins.

    Args:
        tokenizer: With or without a chat template; without, both are plain text.
        system: The system message, or empty. A template that refuses or drops it gets it as the
            beginning of the user message instead.

    Returns:
        Head, with the system message in it, and tail. A block for thoughts that the template leaves
        open is closed in the tail, empty.

    Raises:
        TeacherError: The template renders no user message, or not once.
    """
    opening = f"{system}\n\n" if system else ""
    if not tokenizer.chat_template:
        return opening, "\n"
    user = {"role": "user", "content": _SENTINEL}
    if system:
        try:
            rendered = _render(tokenizer, [{"role": "system", "content": system}, user])
        except _REFUSALS:
            rendered = ""
        head, _, tail = rendered.partition(_SENTINEL)
        if system.strip() in head and rendered.count(_SENTINEL) == 1:
            return head, _without_thoughts(tail)
    try:
        rendered = _render(tokenizer, [user])
    except _REFUSALS as error:
        raise TeacherError(
            f"The chat template of the teacher cannot render a single user message: {error}. "
            "Expected a model tuned on conversations, or one without a chat template. Correct the "
            "template in its tokenizer, or choose another teacher.model."
        ) from error
    head, *tails = rendered.split(_SENTINEL)
    if len(tails) != 1:
        raise TeacherError(
            f"The chat template of the teacher shows a user message {len(tails)} times; expected "
            "once. Correct the template in its tokenizer, or choose another teacher.model."
        )
    return head + opening, _without_thoughts(tails[0])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),  # pyright: ignore
            add_generation_prompt=True,
            enable_thinking=False,  # templates that know it close the thinking block at once
        )
    )


def _without_thoughts(tail: str) -> str:
    """The tail with an empty block in place of one that is open, as hybrid models are trained."""
    for opened, closed in _THINKING.items():
        if tail.rfind(opened) > tail.rfind(closed):
            return f"{tail.rstrip()}\n\n{closed}\n\n"
    return tail
