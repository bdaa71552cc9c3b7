"""How a row becomes a prompt and the text to learn: the paper's templates, by name.

A style says what stands around the instruction and what is done to the output. The texts are those of pyreft
(`examples/loreft/templates.py`, `task_config.py`), to the character.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from reft_kernels.training.data import DEFAULT_TEMPLATE, build_prompt
from reft_kernels.training.tokens import starts_by_itself

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMMONSENSE_TRIGGER = "the correct answer is "
GSM8K_MARK = "####"
GSM8K_TRIGGER = "The final answer is: "
GSM8K_TEMPLATE = "%s\nAnswer the above question. First think step by step and then answer the final number.\n"

# The prompts of Alpaca, which pyreft trains its instruction and arithmetic models with.
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
%s

### Input:
%s

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
%s

### Response:
"""


@dataclass(frozen=True)
class PromptStyle:
    """What stands around an instruction, and what becomes of an output.

    Attributes:
        template: the prompt, with `%s` once, for the instruction.
        template_with_input: the prompt of a row that has an input, with `%s` for the instruction and, after it, `%s`
            for the input. None: the input follows the instruction after a blank line, see `build_prompt`.
        trigger: what leads to the answer in the target; put in front of an output that does not hold it.
        before_target: what stands between prompt and target, learned with the target.
        replace: (old, new), replaced wherever old stands in an output.
        chat: the prompt is a conversation in the tokenizer's chat template, its user's turn being `template`.
        system: what that conversation starts with; None leaves it to the chat template.

    Raises ValueError where a template does not hold its `%s`.
    """

    template: str = "%s"
    template_with_input: str | None = None
    trigger: str = ""
    before_target: str = ""
    replace: tuple[str, str] | None = None
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        for name, text, count in (("template", self.template, 1), ("template_with_input", self.template_with_input, 2)):
            if text is not None and text.count("%s") != count:
                raise ValueError(f'{name} must hold "%s" {count} times, got {text!r}')

    def prompt(self, instruction: str, input: str = "") -> str:
        """The prompt, for a chat the user's turn."""
        if not input or self.template_with_input is None:
            return build_prompt(instruction, input, self.template)
        before, between, after = self.template_with_input.split("%s")
        return f"{before}{instruction}{between}{input}{after}"

    def target(self, output: str) -> str:
        """The text to learn."""
        if self.replace is not None:
            output = output.replace(*self.replace)
        return self.before_target + (output if self.trigger in output else self.trigger + output)


PROMPT_STYLES: Mapping[str, PromptStyle] = MappingProxyType(
    {
        "plain": PromptStyle(DEFAULT_TEMPLATE),
        "commonsense": PromptStyle(DEFAULT_TEMPLATE, trigger=COMMONSENSE_TRIGGER),
        "cloze": PromptStyle("Question: %s\nAnswer:", before_target=" "),
        "math": PromptStyle(WITHOUT_INPUT, WITH_INPUT),
        "gsm8k": PromptStyle(GSM8K_TEMPLATE, replace=(GSM8K_MARK, GSM8K_TRIGGER)),
        "alpaca": PromptStyle(WITHOUT_INPUT, WITH_INPUT),
        "memorise": PromptStyle(),
        "chat": PromptStyle(chat=True),
    }
)
"""The styles by name. plain changes nothing of an output; gsm8k keeps its calculator marks (`<<48/2=24>>`), and the
space that follows `####`, as pyreft does."""


def prompt_style(style: str | PromptStyle, *, template: str | None = None, trigger: str | None = None) -> PromptStyle:
    """The style of a name; a style is returned as it is.

    Args:
        template: another template in the place of the style's own, for rows with and without an input.
        trigger: another trigger in the place of the style's own; a style without one stays without.

    Raises ValueError for an unknown name, and a template that does not hold its `%s`.
    """
    if not isinstance(style, PromptStyle):
        if style not in PROMPT_STYLES:
            raise ValueError(f"style must be one of {', '.join(PROMPT_STYLES)}, got {style!r}")
        style = PROMPT_STYLES[style]
    if template is not None:
        style = replace(style, template=template, template_with_input=None)
    return replace(style, trigger=trigger) if trigger is not None and style.trigger else style


def prompt_and_target(
    instruction: str,
    input: str = "",
    output: str | None = None,
    *,
    style: str | PromptStyle = "commonsense",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[str, str | None]:
    """The prompt of a row and the text that follows it in training, without the end token; None without an output.

    Args:
        instruction, input, output: of the row; `input` may be empty.
        style: a name of `PROMPT_STYLES`, or a style of the caller's own.
        tokenizer: needed for a chat, no other style looks at it.

    Raises:
        ValueError: an unknown style; a chat without a tokenizer that has a chat template; a chat template whose
            conversation with an answer does not begin with the prompt for it.
    """
    chosen = prompt_style(style)
    prompt = chosen.prompt(instruction, input)
    target = None if output is None else chosen.target(output)
    if not chosen.chat:
        return prompt, target
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("a chat prompt needs a tokenizer with a chat template, this one has none")
    return _chat(tokenizer, chosen.system, prompt, target)


def _chat(
    tokenizer: PreTrainedTokenizerBase, system: str | None, user: str, answer: str | None
) -> tuple[str, str | None]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True)
    if answer is None:
        return prompt, None
    whole = _rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    if not whole.startswith(prompt):
        raise ValueError(
            "the chat template writes another prompt before an answer than without one: it ends with "
            f"{prompt[-40:]!r}, and what should follow it is in {whole[-80 - len(answer) :]!r}"
        )
    target = whole[len(prompt) :]
    if not tokenizer.eos_token:
        return prompt, target
    # Most templates end a turn with the end token, which training appends to every target.
    body, end, rest = target.rpartition(str(tokenizer.eos_token))
    return prompt, body if end and not rest.strip() else target


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """The conversation as text, without a start token that the tokenizer puts there again."""
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return str(text).removeprefix(str(tokenizer.bos_token)) if starts_by_itself(tokenizer) else str(text)
