"""ReFT and LoRA trained together: pyreft's notebook reft_with_lora, and README.

The quick start once more, with a LoRA of rank 4 on the attention output of the edited layer: peft wraps the base model
and the representation is named by its path. Both are saved in one folder, and loaded from it. Needs
`pip install peft`. About a minute on two CPU cores.

    python -m examples.reft_with_lora
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

import reft_kernels as pyreft
from examples.common import base_answer, base_model_path, parse, rotated
from examples.quickstart import chat, prompt_no_input_template, training_examples, unseen


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses, how many trained answers are right, and the answers to `unseen`."""
    options = parse("reft_with_lora", __doc__, arguments, epochs=100)
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise SystemExit("this example needs peft: pip install peft") from error
    examples = training_examples[:4] if options.tiny else training_examples
    prompts, answers = [prompt_no_input_template % e[0] for e in examples], [e[1] for e in examples]
    device = options.device
    layers_to_transform = [1 if options.tiny else 15]
    model_name_or_path = base_model_path(options, rotated(prompts, answers))

    def lora_model() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
        )
        peft_config = LoraConfig(
            r=4,
            lora_alpha=32,
            target_modules=["o_proj"],
            layers_to_transform=layers_to_transform,
            use_rslora=True,
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        )
        return get_peft_model(model, peft_config)

    model = lora_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token
    before = base_answer(model, tokenizer, prompt_no_input_template % unseen, max_new_tokens=32)

    reft_config = pyreft.ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": f"base_model.model.model.layers[{layer}].output",
                "low_rank_dimension": 4,
                "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
            }
            for layer in layers_to_transform
        ]
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    # It froze LoRA with the rest of the base model.
    reft_model.model.enable_adapter_layers()
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

    reft_model.model.eval()
    for _k, v in reft_model.interventions.items():
        _ = v[0].eval()
    right = sum(chat(reft_model, tokenizer, e[0]) == e[1] for e in examples)
    after = chat(reft_model, tokenizer, unseen)

    # LoRA's weights are the base model's, hence include_model.
    reft_model.save(save_directory=str(options.output / "reft_to_share"), include_model=True)
    reft_model = pyreft.ReftModel.load(str(options.output / "reft_to_share"), lora_model(), include_model=True)
    loaded = chat(reft_model, tokenizer, unseen)

    print(f"{right} of {len(examples)} trained answers are right.")
    print(f"Not trained: {unseen}")
    print(f"  before:  {before}\n  after:   {after}\n  loaded:  {loaded}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "right": right, "before": before, "after": after, "loaded": loaded}


if __name__ == "__main__":
    main()
