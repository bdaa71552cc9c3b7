"""Prompt styles: the paper's templates to the character, and chats."""

from __future__ import annotations

import pytest
from training_support import make_tokenizer

from reft_kernels.training.prompts import PROMPT_STYLES, PromptStyle, prompt_and_target, prompt_style

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_commonsense() -> None:
    assert prompt_and_target("true or false?", output="the correct answer is true") == (
        "true or false?\n",
        "the correct answer is true",
    )
    assert prompt_and_target("a", "b", "true") == ("a\n\nb\n", "the correct answer is true")
    assert prompt_and_target("a") == ("a\n", None)


def test_gsm8k() -> None:
    """The calculator marks stay, and so does the space after ####."""
    prompt, target = prompt_and_target("How many?", output="1+1 = <<1+1=2>>2.\n#### 2", style="gsm8k")
    assert prompt == (
        "How many?\nAnswer the above question. First think step by step and then answer the final number.\n"
    )
    assert target == "1+1 = <<1+1=2>>2.\nThe final answer is:  2"


@pytest.mark.parametrize("style", ["alpaca", "math"])
def test_alpaca(style: str) -> None:
    assert prompt_and_target("Add 100%s.", output="o", style=style) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd 100%s.\n\n### Response:\n",
        "o",
    )
    prompt, _ = prompt_and_target("Add %s.", "1 and %s", style=style)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd %s.\n\n### Input:\n1 and %s\n\n### Response:\n"
    )


def test_memorise_leaves_everything_as_it_is() -> None:
    assert prompt_and_target("ALIC#ID1->", output=" Alice", style="memorise") == ("ALIC#ID1->", " Alice")


@pytest.mark.parametrize("bos", [True, False], ids=["start token added", "no start token"])
def test_a_chat(bos: bool) -> None:
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = CHAT
    start = "" if bos else "<s>"
    found = prompt_and_target("which ?", "the box", " red", style="chat", tokenizer=tokenizer)
    assert found == (f"{start}[user] which ?\n\nthe box</s>\n[assistant] ", "red")
    told = PromptStyle("say %s", chat=True, system="Be brief.")
    found = prompt_and_target("red", style=told, tokenizer=tokenizer)
    assert found == (f"{start}[system] Be brief.</s>\n[user] say red</s>\n[assistant] ", None)
    ids = tokenizer(found[0])["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_turn_that_ends_with_another_token_keeps_it() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace("{{ eos_token }}", "<turn>")
    _, target = prompt_and_target("a", output="red", style="chat", tokenizer=tokenizer)
    assert target == "red<turn>\n"


def test_bad_arguments_are_named() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"style must be one of plain, .*, got 'poem'"):
        prompt_style("poem")
    with pytest.raises(ValueError, match="template must hold \"%s\" 1 times, got 'no place'"):
        PromptStyle("no place")
    with pytest.raises(ValueError, match='template_with_input must hold "%s" 2 times'):
        PromptStyle("%s", "%s")
    for given in (None, tokenizer):
        with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
            prompt_and_target("a", style="chat", tokenizer=given)
    tokenizer.chat_template = CHAT.replace("[assistant] {%", "[thinking] {%")
    with pytest.raises(ValueError, match=r"another prompt before an answer than without one: .*\[thinking\] "):
        prompt_and_target("a", output="b", style="chat", tokenizer=tokenizer)
    assert set(PROMPT_STYLES) == {"plain", "commonsense", "cloze", "math", "gsm8k", "alpaca", "memorise", "chat"}
