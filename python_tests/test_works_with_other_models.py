"""Models of every kind: encoder-decoders, vision and speech by module paths, classifiers; against edits by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hand_edits import edited_by_hand, strengthen
from tiny_models import WIDTH, random_batch, tiny_model
from torch import Tensor, nn

from reft_kernels.config import ReftConfig
from reft_kernels.interventions import LoreftIntervention
from reft_kernels.model import ReftModel, get_reft_model


def build(class_name: str, config: Any) -> Any:
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=30, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    config.decoder_start_token_id, config.eos_token_id = 0, None
    return build("T5ForConditionalGeneration", config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=30, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, pad_token_id=1,
        bos_token_id=0, eos_token_id=None, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return build("BartForConditionalGeneration", config)


VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def vit() -> Any:
    return build("ViTForImageClassification", transformers.ViTConfig(**VISION, num_labels=3))


def clip_vision() -> Any:
    return build("CLIPVisionModel", transformers.CLIPVisionConfig(**VISION, projection_dim=8))


def clip() -> Any:
    text = {"vocab_size": 30, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"intermediate_size": 24, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return build("CLIPModel", config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=30, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = build("WhisperForConditionalGeneration", config)
    model.generation_config.eos_token_id = None
    return model


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 4), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return build("Wav2Vec2ForCTC", config)


def make(model: Any, *paths: str, positions: str | None = None) -> ReftModel:
    places = [
        {"component": path, "intervention": LoreftIntervention(embed_dim=WIDTH, low_rank_dimension=2)} for path in paths
    ]
    reft_model = get_reft_model(model, ReftConfig([{**place, "positions": positions} for place in places])).eval()
    strengthen(reft_model.interventions)
    return reft_model


def module_at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.removesuffix(".output").replace("[", ".").replace("]", ""))


def check(reft_model: ReftModel, inputs: dict[str, Any], rows: list[Any]) -> None:
    """Output and gradients of edits at ``rows`` (of each intervention; None: every token) are those made by hand."""
    paths = [item.component for item in reft_model.representations]
    modules = list(reft_model.interventions.values())
    edits: Any = [
        (module_at(reft_model.model, path), "output", module, table)
        for path, module, table in zip(paths, modules, rows, strict=True)
    ]
    parameters = list(reft_model.interventions.parameters())
    locations = None if all(table is None for table in rows) else rows
    with edited_by_hand(edits):
        wanted = reft_model.model(**inputs)[0]
    plain = reft_model.model(**inputs)[0]
    found = reft_model(**inputs, unit_locations=locations)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - plain).abs().max() > 1e-2
    want = torch.autograd.grad(wanted.square().mean(), parameters, allow_unused=True)
    got = torch.autograd.grad(found.square().mean(), parameters, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 30, shape)


@pytest.mark.parametrize("model", [t5, bart])
def test_encoder_and_decoder(model: Any) -> None:
    reft_model = (
        make(model(), "encoder.block[1].output", "decoder.block[0].output")
        if model is t5
        else make(model(), "model.encoder.layers[1].output", "model.decoder.layers[0].output")
    )
    inputs = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    inputs["decoder_input_ids"] = ids(2, 8)
    check(reft_model, inputs, [None, None])
    check(reft_model, inputs, [[[0], [4]], [[7, 0], [2, 5]]])  # each counts the tokens of its own side
    check(reft_model, inputs, [[[0, 1], [4]], None])
    table = torch.tensor([[[0, 4], [1, -1]], [[7, -1], [6, 3]]])
    torch.testing.assert_close(
        reft_model(**inputs, unit_locations=table).logits, reft_model(**inputs, unit_locations=table.tolist()).logits
    )
    with pytest.raises(ValueError, match=r"name position 8, but the output of .*decoder.* has 8 tokens"):
        reft_model(**inputs, unit_locations=[[[0], [0]], [[8], [0]]])
    with pytest.raises(ValueError, match=r"name position 5, but the output of .*encoder.* has 5 tokens"):
        reft_model(**inputs, unit_locations=[[[0], [5]], [[7], [0]]])


def generated_by_hand(model: Any, inputs: dict[str, Tensor], start: int, new: int, edits: list[Any]) -> Tensor:
    """Greedy decoding of an encoder-decoder by full passes, all with the same edits."""
    batch = next(iter(inputs.values())).shape[0]
    out = torch.full((batch, 1), start)
    for _ in range(new):
        with torch.no_grad(), edited_by_hand(edits):
            logits = model(**inputs, decoder_input_ids=out, use_cache=False).logits
        out = torch.cat([out, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return out


@pytest.mark.parametrize("use_cache", [True, False])
def test_positions_of_encoder_and_decoder_in_generation(use_cache: bool) -> None:
    model = t5()
    reft_model = make(model, "encoder.block[1].output", "decoder.block[0].output")
    modules = list(reft_model.interventions.values())
    inputs = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "output_logits": True}
    options["return_dict_in_generate"] = True
    for rows in ([[[0], [4]], [[2, 5], [0, 3]]], [[[0], [4]], None], [None, [[1], [4]]]):
        edits = [
            (model.encoder.block[1], "output", modules[0], rows[0]),
            (model.decoder.block[0], "output", modules[1], rows[1]),
        ]
        wanted = generated_by_hand(model, inputs, 0, 6, edits)
        found = reft_model.generate(**inputs, unit_locations=rows, **options)
        assert found.sequences.equal(wanted)
        assert not found.logits[-1].equal(model.generate(**inputs, **options).logits[-1])
    edits = [(model.decoder.block[0], "output", modules[1], None)]
    wanted = generated_by_hand(model, inputs, 0, 6, edits)
    assert reft_model.generate(**inputs, intervene_on_prompt=False, **options).sequences.equal(wanted)


def test_positions_of_the_prompt_in_the_encoder() -> None:
    model = t5()
    reft_model = make(model, "encoder.block[0].output", positions="f1+l1")
    intervention = next(iter(reft_model.interventions.values()))
    batch = {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = 0
    edits: Any = [(model.encoder.block[0], "output", intervention, [[0, 5], [0, 3]])]
    wanted = generated_by_hand(model, batch, 0, 5, edits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert reft_model.generate(**batch, **options).equal(wanted)
    beams = {**options, "num_beams": 3, "num_return_sequences": 2}
    with edited_by_hand(edits):
        wanted = model.generate(**batch, **beams)
    assert reft_model.generate(**batch, **beams).equal(wanted)


@pytest.mark.parametrize(
    ("model", "path"), [(vit, "vit.encoder.layer[0].output"), (clip_vision, "vision_model.encoder.layers[0].output")]
)
def test_patches_of_images(model: Any, path: str) -> None:
    base = model()
    if model is vit and not hasattr(base.vit, "encoder"):
        path = "vit.layers[0].output"  # transformers 5
    if model is clip_vision and not hasattr(base, "vision_model"):
        path = "encoder.layers[0].output"
    reft_model = make(base, path)
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16)}
    check(reft_model, inputs, [None])
    check(reft_model, inputs, [[[0], [4, 1], [2]]])  # 4 patches and the class token
    with pytest.raises(ValueError, match=r"name position 5, but the output of .* has 5 tokens"):
        reft_model(**inputs, unit_locations=[[[0], [5], [2]]])
    with pytest.raises(ValueError, match=r"positions need input_ids or inputs_embeds, got \['pixel_values'\]"):
        make(base, path, positions="f1")(**inputs)


def test_images_beside_texts() -> None:
    """Two texts and three images; the positions are for the rows of what is edited."""
    reft_model = make(clip(), "vision_model.encoder.layers[0].output")
    inputs = {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    inputs["pixel_values"] = torch.randn(3, 3, 16, 16)
    intervention = next(iter(reft_model.interventions.values()))
    place = reft_model.model.vision_model.encoder.layers[0]
    with edited_by_hand([(place, "output", intervention, [[0], [4], [2]])]):
        wanted = reft_model.model(**inputs).logits_per_image
    for locations in ([[[0], [4], [2]]], torch.tensor([[[0], [4], [2]]])):
        found = reft_model(**inputs, unit_locations=locations).logits_per_image
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found = reft_model(**inputs, intervention_locations=torch.tensor([[[0]], [[4]], [[2]]])).logits_per_image
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_speech() -> None:
    reft_model = make(wav2vec2(), "wav2vec2.encoder.layers[0].output")
    inputs = {"input_values": torch.randn(2, 90)}
    check(reft_model, inputs, [None])
    check(reft_model, inputs, [[[0, 9], [3]]])


def test_speech_to_text() -> None:
    model = whisper()
    reft_model = make(model, "model.encoder.layers[0].output", "model.decoder.layers[0].output")
    inputs = {"input_features": torch.randn(2, 4, 20)}
    check(reft_model, {**inputs, "decoder_input_ids": ids(2, 4)}, [None, None])
    check(reft_model, {**inputs, "decoder_input_ids": ids(2, 4)}, [[[0, 9], [3]], [[1], [3]]])
    modules = list(reft_model.interventions.values())
    rows: Any = [[[0, 9], [3]], [[1, 2], [3]]]
    edits: Any = [
        (model.model.encoder.layers[0], "output", modules[0], rows[0]),
        (model.model.decoder.layers[0], "output", modules[1], rows[1]),
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with edited_by_hand(edits):
        wanted = model.generate(**inputs, use_cache=False, **options)
    found = reft_model.generate(**inputs, unit_locations=rows, **options)
    assert found.sequences.equal(wanted.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)
    assert not found.logits[-1].equal(model.generate(**inputs, **options).logits[-1])


def classifier(architecture: str) -> tuple[Any, nn.Module]:
    """A model for three classes and its head, which is to be trained."""
    if architecture != "llama":
        model = tiny_model(architecture, num_labels=3)
        return model, model.classifier
    config = tiny_model("llama").config
    config.num_labels = 3
    model = build("LlamaForSequenceClassification", config)
    return model, model.score


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama"])
def test_classifiers_train_their_heads(architecture: str, tmp_path: Path) -> None:
    """The base model frozen but for its head, as pyreft's recipes have it; saved and loaded with the head."""
    model, head = classifier(architecture)
    reft_model = get_reft_model(model, ReftConfig(method="loreft", layers="all", rank=2, positions="f1+l1"))
    assert not any(p.requires_grad for p in model.parameters())
    head.requires_grad_(True)
    trained = {name: p for name, p in reft_model.named_parameters() if p.requires_grad}
    assert len(trained) == len([*head.parameters(), *reft_model.interventions.parameters()])
    batch = {**random_batch([6, 4, 5, 6]), "labels": torch.tensor([0, 1, 2, 1])}
    before = float(reft_model.eval()(**batch).loss)
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    reft_model.train()
    for _ in range(40):
        reft_model(**batch).loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
    reft_model.eval()
    found = reft_model(**batch)
    assert float(found.loss) < 0.5 * before
    assert (found.logits - model(**batch).logits).abs().max() > 1e-2
    reft_model.save(tmp_path / "adapter", include_model=True)
    fresh, other_head = classifier(architecture)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in other_head.parameters():
            p.normal_()
    loaded = ReftModel.load(tmp_path / "adapter", fresh, include_model=True)
    torch.testing.assert_close(loaded(**batch).logits, found.logits, rtol=0, atol=0)
