"""The quick start on the installed pyreft itself, with its edits and trainers replaced by patch_pyreft().

For scripts in which not even the import shall change. Prints what was patched. Needs pyreft and pyvene, which the
environment of `make test-pyreft` has. About a minute on two CPU cores.

    python -m examples.patch_an_installed_pyreft
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from examples.common import base_answer, base_model_path, parse, rotated
from examples.quickstart import chat, prompt_no_input_template, training_examples, unseen
from reft_kernels import patch_pyreft


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the report, the losses, how many trained answers are right, and those to `unseen`."""
    options = parse("patch_an_installed_pyreft", __doc__, arguments, epochs=100)
    try:
        report = patch_pyreft()
    except ImportError as error:
        raise SystemExit(f"this example needs pyreft and pyvene: {error}") from error
    print(report)
    import pyreft

    examples = training_examples[:4] if options.tiny else training_examples
    prompts, answers = [prompt_no_input_template % e[0] for e in examples], [e[1] for e in examples]
    device = options.device
    model_name_or_path = base_model_path(options, rotated(prompts, answers))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token

    reft_config = pyreft.ReftConfig(
        representations={
            "layer": 1 if options.tiny else 15,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()

    data_module = pyreft.make_last_position_supervised_data_module(tokenizer, model, prompts, answers)
    training_args = transformers.TrainingArguments(
        num_train_epochs=options.epochs,
        output_dir=str(options.output / "trainer"),
        per_device_train_batch_size=10,
        learning_rate=4e-3,
        logging_steps=20,
        report_to=[],
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    _ = trainer.train()

    right = sum(chat(reft_model, tokenizer, e[0]) == e[1] for e in examples)
    before = base_answer(model, tokenizer, prompt_no_input_template % unseen, max_new_tokens=32)
    after = chat(reft_model, tokenizer, unseen)
    print(f"{right} of {len(examples)} trained answers are right.")
    print(f"Not trained: {unseen}")
    print(f"  before:  {before}\n  after:   {after}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"report": report, "losses": losses, "right": right, "before": before, "after": after}


if __name__ == "__main__":
    main()
