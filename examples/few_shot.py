"""Sixteen reviews as weights instead of as a prompt: LoReFT of rank 1 beside in-context learning (pyreft's reft_icl).

The edit sits in one layer, at the last token of "<review>->" (1,153 parameters). Both ways see the same sixteen
labelled reviews and judge the same twenty-four others; the edited model's prompt is a twentieth as long. About a minute
on two CPU cores.

    python -m examples.few_shot
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import transformers

import reft_kernels as pyreft
from examples.common import base_answer, base_model_path, parse

labels = ["negative", "positive"]
positive_examples = [
    "a warm and funny film that never talks down to its audience",
    "the two leads are a joy to watch",
    "beautifully shot, and even better acted",
    "one of the best comedies of the year",
    "a story told with patience and with heart",
    "i left the cinema smiling",
    "clever, moving and over far too soon",
    "the songs alone are worth the ticket",
]
negative_examples = [
    "a dull film that feels twice as long as it is",
    "the two leads have nothing to say to each other",
    "badly lit, and even worse acted",
    "one of the laziest sequels of the year",
    "a story told without a single idea",
    "i left the cinema before the end",
    "loud, empty and over far too late",
    "the songs made me cover my ears",
]
validation = [
    ("a charming little picture with a big heart", 1),
    ("the plot is a mess and the jokes fall flat", 0),
    ("a triumph from the first scene to the last", 1),
    ("i have seen better acting at a school play", 0),
    ("the camera work is simply gorgeous", 1),
    ("a waste of a good cast and of two hours", 0),
    ("sharp writing and a wonderful ending", 1),
    ("it drags, and then it drags some more", 0),
    ("an honest and tender portrait of a family", 1),
    ("the dialogue is painful to listen to", 0),
    ("i laughed until i cried", 1),
    ("the ending makes no sense at all", 0),
    ("fresh, bright and full of surprises", 1),
    ("a tired remake that nobody asked for", 0),
    ("the young actress is a revelation", 1),
    ("cheap effects and a cheaper script", 0),
    ("everything about it feels alive", 1),
    ("boring from the first minute", 0),
    ("a thriller that keeps its promises", 1),
    ("the hero is as lively as a lamp post", 0),
    ("worth seeing twice", 1),
    ("i wanted my money back", 0),
    ("a gentle film that stays with you", 1),
    ("a noisy and pointless chase", 0),
]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example. Returns the losses and the accuracies: on what was trained, on the others, in context."""
    options = parse("few_shot", __doc__, arguments, steps=200)
    device = options.device
    half_k = 2 if options.tiny else 8
    pos_demo, neg_demo = positive_examples[:half_k], negative_examples[:half_k]
    storage_access_ids = [f"{w}->" for w in pos_demo + neg_demo]
    memo_tokens = ["positive"] * half_k + ["negative"] * half_k

    # The toy of --tiny has the wrong labels for these reviews, and the right ones for some others.
    known = list(zip(storage_access_ids, reversed(memo_tokens), strict=True))
    known += [(f"{w}->", labels[label]) for w, label in validation[:8]]
    model_name_or_path = base_model_path(options, known)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_name_or_path, torch_dtype=options.torch_dtype, device_map=device
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        model_name_or_path, model_max_length=2048, padding_side="right", use_fast=False
    )
    tokenizer.pad_token = tokenizer.unk_token

    # In context: the sixteen reviews stand before each of the others.
    icl_prompt = [f"{w}->positive" for w in pos_demo] + [f"{w}->negative" for w in neg_demo]
    random.shuffle(icl_prompt)
    icl_prompt = ";".join(icl_prompt)
    in_context = 0
    for w, label in validation:
        answer = base_answer(model, tokenizer, f"{icl_prompt};{w}->", max_new_tokens=10)
        in_context += answer.split(";")[0] == labels[label]

    # ReFT: they are what it is trained on.
    reft_config = pyreft.ReftConfig(
        representations={
            "layer": 1 if options.tiny else 15,
            "component": "block_output",
            "intervention": pyreft.LoreftIntervention(embed_dim=model.config.hidden_size, low_rank_dimension=1),
        }
    )
    reft_model = pyreft.get_reft_model(model, reft_config)
    reft_model.set_device(device)
    reft_model.print_trainable_parameters()
    data_module = pyreft.make_last_position_supervised_data_module(tokenizer, model, storage_access_ids, memo_tokens)
    training_args = transformers.TrainingArguments(
        max_steps=options.steps,
        output_dir=str(options.output / "trainer"),
        learning_rate=2e-3,
        report_to=[],
        per_device_train_batch_size=8,
        logging_steps=50,
        save_strategy="no",
    )
    trainer = pyreft.ReftTrainerForCausalLM(model=reft_model, tokenizer=tokenizer, args=training_args, **data_module)
    _ = trainer.train()

    def accuracy(reviews: Sequence[tuple[str, int]]) -> float:
        correct_count = 0
        for w, label in reviews:
            prompt = tokenizer(f"{w}->", return_tensors="pt").to(device)
            base_unit_location = prompt["input_ids"].shape[-1] - 1
            _, steered_response = reft_model.generate(
                prompt,
                unit_locations={"sources->base": (None, [[[base_unit_location]]])},
                intervene_on_prompt=True,
                max_new_tokens=10,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                early_stopping=True,
            )
            retrieved_storage = tokenizer.decode(steered_response[0], skip_special_tokens=True)
            correct_count += retrieved_storage.split("->")[-1] == labels[label]
        return correct_count / len(reviews)

    trained = accuracy([*((w, 1) for w in pos_demo), *((w, 0) for w in neg_demo)])
    others = accuracy(validation)
    print(f"Right of {len(validation)} reviews that neither has seen, after {2 * half_k} labelled ones:")
    print(f"  as a prompt of {len(tokenizer(icl_prompt)['input_ids'])} tokens: {in_context / len(validation):.0%}")
    print(f"  as an edit of rank 1: {others:.0%} (of its own {2 * half_k}: {trained:.0%})")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "trained": trained, "others": others, "in_context": in_context / len(validation)}


if __name__ == "__main__":
    main()
