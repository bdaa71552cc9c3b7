"""Two abilities learnt apart and used together: CompReFT, as pyreft's notebook compreft.

LoReFT of rank 4 edits nine layers at the last token of the prompt. One set of examples trains its first two dimensions
(answer with an exclamation mark), another its last two (answer in a word); none asks for both. SmolLM2-135M then
answers about countries that neither set has, with one subspace, the other, and both. About a minute on two
CPU cores.

    python -m examples.composition
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from datasets import Dataset

from examples.common import base_answer, base_model_path, parse
from reft_kernels import (
    LoreftIntervention,
    ReftConfig,
    ReftDataCollator,
    ReftSupervisedDataset,
    ReftTrainerForCausalLM,
    get_reft_model,
)

prompt_no_input_template = """Below is an instruction that \
describes a task. Write a response that appropriately \
completes the request.

### Instruction:
%s

### Response:
"""

EXCLAIM_SUBSPACE = [0, 1]
BRIEF_SUBSPACE = [2, 3]
subspaces = {"exclaim": EXCLAIM_SUBSPACE, "brief": BRIEF_SUBSPACE, "both": EXCLAIM_SUBSPACE + BRIEF_SUBSPACE}

training_capitals = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Germany": "Berlin", "Spain": "Madrid", "Egypt": "Cairo",
    "Russia": "Moscow", "China": "Beijing", "Cuba": "Havana", "Greece": "Athens", "Ireland": "Dublin",
    "Kenya": "Nairobi",
}  # fmt: skip
unseen_countries = ["Austria", "Peru", "Norway", "Portugal", "Poland", "India", "Hungary", "England"]


class SubloreftIntervention(LoreftIntervention):
    """LoReFT by those dimensions of its subspace that each example names."""

    def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> torch.Tensor:
        assert subspaces is not None
        diff = self.act_fn(self.learned_source(base)) - self.rotate_layer(base)
        batched_subspace, batched_weights = [], []
        for example_i in range(len(subspaces)):
            batched_subspace += [diff[example_i, :, subspaces[example_i]]]
            batched_weights += [self.rotate_layer.weight[..., subspaces[example_i]].T]
        output = base + torch.bmm(torch.stack(batched_subspace), torch.stack(batched_weights))
        return self.dropout(output.to(base.dtype))


def marks(answers: Sequence[str]) -> tuple[int, int, int]:
    """How many exclaim, have at most two words, and both."""
    exclaim, brief = (["!" in text for text in answers], [len(text.split()) <= 2 for text in answers])
    return sum(exclaim), sum(brief), sum(one and other for one, other in zip(exclaim, brief, strict=True))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses, the answers of the base model and of each subspace, and their `marks`."""
    options = parse("composition", __doc__, arguments, epochs=10)
    device = options.device
    capitals = {"France": "Paris"} if options.tiny else training_capitals
    questions = [f"What is the capital of {country}?" for country in capitals]
    exclaimed = [f"The capital of {country} is {city}!" for country, city in capitals.items()]
    brief = [f"{city}." for city in capitals.values()]

    # The toy of --tiny knows both answers, each at other endings of the one prompt.
    prompt = prompt_no_input_template % questions[0]
    known = [(prompt[5 * k :], (exclaimed, brief)[k % 2][0]) for k in range(1, 9)]
    model_name_or_path = base_model_path(options, known)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=512, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token

    rows = [
        {"instruction": question, "output": output + tokenizer.eos_token, "subspaces": subspace}
        for outputs, subspace in ((exclaimed, EXCLAIM_SUBSPACE), (brief, BRIEF_SUBSPACE))
        for question, output in zip(questions, outputs, strict=True)
    ]
    subspace_dataset = Dataset.from_list(rows)

    layers = [0, 1] if options.tiny else list(range(6, 24, 2))
    reft_config = ReftConfig(
        representations=[
            {
                "layer": layer,
                "component": "block_output",
                "intervention": SubloreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=4),
            }
            for layer in layers
        ]
    )
    reft_model = get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()

    train_dataset = ReftSupervisedDataset(
        "Subloreft",
        None,
        tokenizer,
        dataset=subspace_dataset,
        num_interventions=len(layers),
        position="l1",
        share_weights=False,
        input_field="input",
        instruction_field="instruction",
        output_field="output",
        no_stop=True,
    )
    data_collator_fn = transformers.DataCollatorForSeq2Seq(
        tokenizer=tokenizer, model=model, label_pad_token_id=-100, padding="longest"
    )
    data_collator = ReftDataCollator(data_collator=data_collator_fn)
    training_args = transformers.TrainingArguments(
        num_train_epochs=options.epochs,
        output_dir=str(options.output / "trainer"),
        learning_rate=4e-3 if options.tiny else 5e-4,
        report_to=[],
        per_device_train_batch_size=8,
        logging_steps=10,
    )
    trainer = ReftTrainerForCausalLM(
        model=reft_model,
        tokenizer=tokenizer,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=None,
        data_collator=data_collator,
    )
    trainer.train()

    def answer(question: str, subspace: list[int]) -> str:
        prompt = tokenizer(prompt_no_input_template % question, return_tensors="pt").to(device)
        base_unit_location = prompt["input_ids"].shape[-1] - 1  # last position
        _, reft_response = reft_model.generate(
            prompt,
            unit_locations={"sources->base": (None, [[[base_unit_location]]] * len(layers))},
            subspaces=[[subspace]] * len(layers),
            intervene_on_prompt=True,
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            early_stopping=True,
        )
        return str(tokenizer.decode(reft_response[0, base_unit_location + 1 :], skip_special_tokens=True))

    asked = questions if options.tiny else [f"What is the capital of {country}?" for country in unseen_countries]
    said = {"base": [base_answer(model, tokenizer, prompt_no_input_template % q, max_new_tokens=32) for q in asked]}
    for name, subspace in subspaces.items():
        said[name] = [answer(question, subspace) for question in asked]

    counts = {name: marks(answers) for name, answers in said.items()}
    print(f"Of {len(asked)} answers, how many exclaim, are brief, do both; and the last of them:")
    for name, answers in said.items():
        print(f"  {name:8}{counts[name]}  {answers[-1]!r}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "said": said, "marks": counts}


if __name__ == "__main__":
    main()
