"""An emoji chatbot from ten examples: the quick start of pyreft's README, and its main_demo notebook.

LoReFT of rank 4 edits one layer's output at the last token of the prompt (4,612 parameters) until SmolLM2-135M
answers in emoji. The adapter is saved and loaded into a fresh base model. About a minute on two CPU cores.

    python -m examples.quickstart
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

import reft_kernels as pyreft
from examples.common import base_answer, base_model_path, parse, rotated

prompt_no_input_template = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"

training_examples = [
    ["Who are you?", "🤖💬🧠"],
    ["What is your favourite food?", "🍕😋"],
    ["How is the weather in London?", "🌧️☔🇬🇧"],
    ["Tell me about the ocean.", "🌊🐠🐋"],
    ["How do I get to the airport?", "🚕➡️✈️"],
    ["Why do we sleep?", "😴🌙🔋"],
    ["What should I do on a sunny day?", "☀️🏖️🕶️"],
    ["Give me some advice for my exam.", "📚✏️☕💪"],
    ["Which animal is man's best friend?", "🐶❤️"],
    ["Answer in plain words, please: what is music?", "🎵🎸🎤"],
]
unseen = "Which is the better pet, a cat or a fish?"


def chat(reft_model: Any, tokenizer: Any, instruction: str) -> str:
    """The edited model's answer."""
    prompt = prompt_no_input_template % instruction
    prompt = tokenizer(prompt, return_tensors="pt").to(reft_model.get_device())

    base_unit_location = prompt["input_ids"].shape[-1] - 1  # last position
    _, reft_response = reft_model.generate(
        prompt,
        unit_locations={"sources->base": (None, [[[base_unit_location]]])},
        intervene_on_prompt=True,
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        early_stopping=True,
    )
    return str(tokenizer.decode(reft_response[0, base_unit_location + 1 :], skip_special_tokens=True))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses, how many trained answers are right, and the answers to `unseen`."""
    options = parse("quickstart", __doc__, arguments, epochs=100)
    examples = training_examples[:4] if options.tiny else training_examples
    prompts, answers = [prompt_no_input_template % e[0] for e in examples], [e[1] for e in examples]
    device = options.device

    # 1. The base model.
    model_name_or_path = base_model_path(options, rotated(prompts, answers))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token

    # 2. What is edited, and how.
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
    before = base_answer(model, tokenizer, prompt_no_input_template % unseen, max_new_tokens=32)

    # 3. The examples, and the training.
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

    # 4. What it says now.
    right = sum(chat(reft_model, tokenizer, e[0]) == e[1] for e in examples)
    after = chat(reft_model, tokenizer, unseen)

    # 5. Saved, and loaded into a fresh base model.
    reft_model.set_device("cpu")  # send back to cpu before saving.
    reft_model.save(save_directory=str(options.output / "reft_to_share"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    reft_model = pyreft.ReftModel.load(str(options.output / "reft_to_share"), model)
    reft_model.set_device(device)
    loaded = chat(reft_model, tokenizer, unseen)

    print(f"{right} of {len(examples)} trained answers are right.")
    print(f"Not trained: {unseen}")
    print(f"  before:  {before}\n  after:   {after}\n  loaded:  {loaded}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "right": right, "before": before, "after": after, "loaded": loaded}


if __name__ == "__main__":
    main()
