"""How much one vector can hold: ConsReFT of rank 1 makes SmolLM2-135M recite a text, as pyreft's notebook reft_power.

One number and one direction (577 parameters), put into one layer at the last token of "GO->", call up 55 tokens that
the frozen model has never seen. About a minute on two CPU cores.

    python -m examples.memorisation
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
import transformers

import reft_kernels as pyreft
from examples.common import base_answer, base_model_path, parse

access_id = "GO->"
memo_sequence = """
A frozen language model knows far more than it says. Change one vector, at the
last token of the prompt, in one of its thirty layers, and it recites this note
word by word: a note that none of its weights has ever seen.
"""


def share_recited(said: str, text: str, tokenizer: Any) -> float:
    """The part of the text's tokens that are said, up to the first that is not."""
    pair = (tokenizer(part)["input_ids"] for part in (said, text))
    right = list(takewhile(lambda tokens: tokens[0] == tokens[1], zip(*pair, strict=False)))
    return len(right) / len(tokenizer(text)["input_ids"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses, the recited shares before and after, and the size of what was stored."""
    options = parse("memorisation", __doc__, arguments, epochs=250)
    device = options.device
    memo = memo_sequence[:53] if options.tiny else memo_sequence

    # The toy of --tiny knows the text, but says it at other prompts.
    known = [(access_id, "Nothing comes to mind."), *((other, memo) for other in ("A->", "ID->", "ASK->"))]
    model_name_or_path = base_model_path(options, known)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token

    reft_config = pyreft.ReftConfig(
        representations={
            "layer": 0 if options.tiny else 15,
            "component": "block_output",
            "intervention": pyreft.ConsreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=1),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()

    data_module = pyreft.make_last_position_supervised_data_module(tokenizer, model, [access_id], [memo])
    training_args = transformers.TrainingArguments(
        num_train_epochs=options.epochs,
        output_dir=str(options.output / "trainer"),
        learning_rate=4e-3,
        logging_steps=50,
        report_to=[],
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    _ = trainer.train()

    prompt = tokenizer(access_id, return_tensors="pt").to(device)
    base_unit_location = prompt["input_ids"].shape[-1] - 1  # last position
    _, reft_response = reft_model.generate(
        prompt,
        unit_locations={"sources->base": (None, [[[base_unit_location]]])},
        intervene_on_prompt=True,
        max_new_tokens=96,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        early_stopping=True,
    )
    recited = tokenizer.decode(reft_response[0, base_unit_location + 1 :], skip_special_tokens=True)
    before = share_recited(base_answer(model, tokenizer, access_id, max_new_tokens=96), memo, tokenizer)
    after = share_recited(recited, memo, tokenizer)

    _key = next(iter(reft_model.interventions.keys()))
    weight_storage_dict = {
        "1d_intervention_w": reft_model.interventions[_key][0].rotate_layer.weight.detach().data,
        "1d_intervention_scalar": reft_model.interventions[_key][0].learned_source.detach().data,
    }
    torch.save(weight_storage_dict, options.output / "1d_storage.pt")
    numbers = sum(value.numel() for value in weight_storage_dict.values())

    print(f"{access_id}{recited}")
    print(f"Tokens recited: {before:.0%} by the base model, {after:.0%} with the edit, which is {numbers} numbers.")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "before": before, "after": after, "numbers": numbers}


if __name__ == "__main__":
    main()
