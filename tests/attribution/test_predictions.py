"""What is explained of each kind of model: the right logit, the right input, and by all methods or a reason."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t
from captum.attr import GuidedBackprop
from families import ENCODER_DECODER, SIZES, VISION, VOCAB, build, pixels, text
from torch import nn
from torch.nn.functional import cosine_similarity

import regard
from regard import catalog
from regard.attribution._words import joined, spans
from regard.attribution.guided_grad_cam import guided
from regard.data.scenes import Object, Scene, render
from regard.evaluation.faithfulness import deletion_error, infidelity_error
from regard.prediction import Question, predict
from regard.zoo.recipes.describer import asked

MINILM = Path(os.environ.get("REGARD_MODELS", "")) / "minilm"
OF_FEW = ("prompt_cam", "refam", "seg_token", "stable_semantics", "vl_sam")  # that read models of one kind only
METHODS = [method for method in catalog.methods("attribution") if method not in OF_FEW]
FEW = {"integrated_gradients": {"steps": 8}, "visual_precision_search": {"steps": 2}}  # that take long otherwise
PLAIN = "gradient_x_input"


def seeded(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


def bart(kind=t.BartForConditionalGeneration, **options):
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = t.BartConfig(**ENCODER_DECODER, max_position_embeddings=64, forced_eos_token_id=None, **ids, **options)
    return seeded(kind(config))


def forced():
    model = bart()
    model.generation_config.forced_bos_token_id = 7
    return model, text()


def slopes(score, given):
    """The gradient of a score times what it was taken of, summed over dimensions."""
    return (torch.autograd.grad(score, given)[0] * given).sum(-1).detach()


# Encoders and decoders


def said(model, inputs):
    """The tokens that `generate` writes, from the decoder's start on."""
    return model.generate(**inputs, max_new_tokens=3, num_beams=1, do_sample=False)


def speech():
    config = t.Speech2TextConfig(
        **ENCODER_DECODER,
        num_conv_layers=2,
        conv_channels=16,
        input_feat_per_channel=8,
        max_source_positions=100,
        max_target_positions=50,
        decoder_start_token_id=2,
    )
    sound = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(1))
    return seeded(t.Speech2TextForConditionalGeneration(config)), {"input_features": sound}


def captioner():
    decoder = t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, add_cross_attention=True)
    )
    model = t.VisionEncoderDecoderModel(encoder=t.ViTModel(t.ViTConfig(**VISION)), decoder=decoder)
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0)
    return seeded(model), pixels()


def pix2struct():
    shared = {"hidden_size": 32, "d_ff": 48, "d_kv": 8}
    reads = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "is_decoder": True}
    looks = {"num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "seq_len": 32}
    looks |= {"patch_embed_hidden_size": 48}
    config = t.Pix2StructConfig(text_config={**shared, **reads}, vision_config={**shared, **looks})
    patches = torch.randn(2, 12, 2 + 48, generator=torch.Generator().manual_seed(2))
    patches[..., 0], patches[..., 1] = torch.arange(12) // 4 + 1, torch.arange(12) % 4 + 1
    mask = torch.ones(2, 12)
    mask[1, 8:] = 0
    inputs = {"flattened_patches": patches, "attention_mask": mask}
    return seeded(t.Pix2StructForConditionalGeneration(config)), inputs


def whisper():
    model, inputs = build("whisper")
    return model, {"input_features": inputs["input_features"]}


def t5():
    model, inputs = build("t5")
    return model, {"input_ids": inputs["input_ids"]}


WRITERS = {
    "bart": (lambda: (bart(), text()), "input_ids", ("token",)),
    "bart_forced": (forced, "input_ids", ("token",)),
    "t5": (t5, "input_ids", ("token",)),
    "whisper": (whisper, "input_features", ("row", "column")),
    "speech2text": (speech, "input_features", ("row", "column")),
    "captioner": (captioner, "pixel_values", ("row", "column")),
    "pix2struct": (pix2struct, "flattened_patches", ("token",)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_model_with_an_encoder_says_first_is_explained(name):
    make, over, dims = WRITERS[name]
    model, inputs = make()
    whole = said(model, inputs)
    at = 2 if name == "bart_forced" else 1  # the first that is not forced
    if name == "bart_forced":
        assert (whole[:, 1] == 7).all()
    begun = whole[:, :at]
    if name == "whisper":  # its generate leaves out how it begins
        at, begun = 0, torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=begun).logits[:, -1]
    found = regard.attribute(model, inputs, method=PLAIN)
    assert found.target.values.tolist() == whole[:, at].tolist()
    assert np.allclose(found.score, logits.gather(1, whole[:, at, None])[:, 0], atol=1e-5)
    assert found.attrs["over"] == over
    assert found.dims == ("batch", *dims)
    assert abs(found.values).max() > 0
    given = regard.attribute(model, {**inputs, "decoder_input_ids": begun}, whole[:, at], method=PLAIN)
    assert np.array_equal(given.values, found.values)
    if name == "pix2struct":
        assert (found.values[1, 8:] == 0).all()


def test_source_and_what_was_written_each_have_their_scores():
    model = bart()
    inputs = {**text(), "decoder_input_ids": text(n=12)["input_ids"]}  # the same ids on both sides
    table, decoder = model.get_decoder().embed_tokens, model.get_decoder()
    source = model.get_encoder().embed_tokens(inputs["input_ids"]).detach().requires_grad_()
    written = table(inputs["decoder_input_ids"]).detach().requires_grad_()
    states = model.get_encoder()(inputs_embeds=source).last_hidden_state
    hidden = decoder(inputs_embeds=written, encoder_hidden_states=states).last_hidden_state
    score = (model.lm_head(hidden) + model.final_logits_bias)[:, -1, 5].sum()
    expected = slopes(score, source), slopes(model_score(model, source, written), written)
    for over, values in zip(("input_ids", "decoder_input_ids"), expected):
        found = regard.attribute(model, inputs, 5, over=over, method=PLAIN)
        assert np.allclose(found.values, values, atol=1e-5)
    assert not np.allclose(*expected, atol=1e-3)
    with pytest.raises(ValueError, match="input_ids and decoder_input_ids can be scored"):
        regard.attribute(model, inputs, over="pixel_values", method=PLAIN)
    rolled = regard.attribute(model, inputs, over="decoder_input_ids", method="rollout")
    assert np.allclose(rolled.sum("token"), 1, atol=1e-5)


def model_score(model, source, written):
    states = model.get_encoder()(inputs_embeds=source).last_hidden_state
    hidden = model.get_decoder()(inputs_embeds=written, encoder_hidden_states=states).last_hidden_state
    return (model.lm_head(hidden) + model.final_logits_bias)[:, -1, 5].sum()


def test_a_classifier_that_reads_its_source_twice_is_explained_by_both():
    ids = text()["input_ids"]
    ids[:, -1] = 2
    model = bart(t.BartForSequenceClassification, num_labels=3)
    found = regard.attribute(model, {"input_ids": ids}, 1, method=PLAIN)
    embedded = model.get_encoder().embed_tokens(ids).detach().requires_grad_()
    start = model.get_decoder().embed_tokens(torch.full((2, 1), 2)).detach()
    states = model.get_encoder()(inputs_embeds=embedded).last_hidden_state
    written = torch.cat([start, embedded[:, :-1]], 1)
    hidden = model.get_decoder()(inputs_embeds=written, encoder_hidden_states=states).last_hidden_state
    score = model.classification_head(hidden[:, -1])[:, 1].sum()
    assert np.allclose(found.values, slopes(score, embedded), atol=1e-5)


def test_a_model_that_cannot_begin_says_what_to_give():
    parts = (
        t.BertModel(t.BertConfig(**SIZES)),
        t.BertLMHeadModel(t.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)),
    )
    model = t.EncoderDecoderModel(encoder=parts[0], decoder=parts[1]).eval()
    with pytest.raises(ValueError, match=r"EncoderDecoderModel could not begin to write .* give decoder_input_ids"):
        regard.attribute(model, text(), method=PLAIN)


# Pairs


def siglip():
    config = t.SiglipConfig(text_config={**SIZES, "max_position_embeddings": 32}, vision_config=VISION)
    return seeded(t.SiglipModel(config)), {**text(), **pixels()}


def altclip():
    reads = {**SIZES, "max_position_embeddings": 40, "project_dim": 16}
    config = t.AltCLIPConfig(text_config=reads, vision_config=VISION, projection_dim=16)
    return seeded(t.AltCLIPModel(config)), {**text(), **pixels()}


def two_towers():
    model = t.VisionTextDualEncoderModel(
        vision_model=t.ViTModel(t.ViTConfig(**VISION)), text_model=t.BertModel(t.BertConfig(**SIZES))
    )
    return seeded(model), {**text(), **pixels()}


@pytest.mark.parametrize(
    "make", [lambda: build("clip"), siglip, altclip, two_towers], ids=["clip", "siglip", "altclip", "two_towers"]
)
def test_a_text_and_a_picture_are_explained_over_both(make):
    model, inputs = make()
    with torch.no_grad():
        alike = model(**inputs).logits_per_image
    for over, dims in (("input_ids", ("token",)), ("pixel_values", ("row", "column"))):
        found = regard.attribute(model, inputs, method=PLAIN, over=over)
        assert found.dims == ("batch", *dims)
        assert np.allclose(found.score, alike.diagonal(), atol=1e-5)  # each with its own
        assert found.attrs["predicts"] == "pair"
        assert abs(found.values).max() > 0
        if make is siglip and over == "pixel_values":
            with pytest.raises(ValueError, match=r"attends to it in vision_model, vision_model\.head\.attention"):
                regard.attribute(model, inputs, method="rollout", over=over)
        else:
            assert regard.attribute(model, inputs, method="rollout", over=over).dims == found.dims
    moved = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    other = regard.attribute(model, moved, method=PLAIN)
    assert not np.allclose(other.values, regard.attribute(model, inputs, method=PLAIN).values)


def test_the_pixels_of_a_pair_by_their_own_gradient():
    model, inputs = build("clip")
    given = inputs["pixel_values"].clone().requires_grad_()
    score = model(**{**inputs, "pixel_values": given}).logits_per_image[1, 0]
    expected = (torch.autograd.grad(score, given)[0] * given).sum(1)[1].detach()
    found = regard.attribute(model, inputs, [1, 0], over="pixel_values", method=PLAIN)
    assert np.allclose(found.values[1], expected, atol=1e-5)
    assert float(found.score[1]) == pytest.approx(score.item(), abs=1e-5)


def test_of_several_texts_the_likeliest_is_explained_and_one_against_another():
    model, inputs = build("clip")
    inputs = {"input_ids": text(3)["input_ids"], "pixel_values": inputs["pixel_values"][:1]}
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    found = regard.attribute(model, inputs, over="pixel_values", method="meta_saliency", of=PLAIN)
    assert found.target.values.tolist() == [int(logits.argmax())]
    alone = regard.attribute(model, inputs, over="pixel_values", method=PLAIN)
    assert deletion_error(model, inputs, alone).shape == (1,)  # many pictures, and as many texts as before
    other = int(logits.argmin())
    ahead = regard.attribute(model, inputs, over="pixel_values", against=other, method=PLAIN)
    assert float(ahead.score[0]) == pytest.approx(float(logits.max() - logits.min()), abs=1e-4)
    read = regard.attribute(model, inputs, over="input_ids", method=PLAIN)
    assert read.shape == (3, 12)
    assert np.allclose(read.score, logits, atol=1e-5)


# Embeddings


def test_two_texts_are_compared_by_the_mean_of_their_states():
    model, inputs = build("albert")
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 9:] = 0
    one = {"input_ids": inputs["input_ids"], "attention_mask": mask}
    other = {"input_ids": inputs["input_ids"].flip(1)}
    embedded = model.get_input_embeddings()(one["input_ids"]).detach().requires_grad_()
    states = model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    with torch.no_grad():
        beside = model(**other).last_hidden_state
    cosine = cosine_similarity(mean, beside.mean(1))
    found = regard.attribute(model, one, beside=other, method=PLAIN)
    assert np.allclose(found.score, cosine.detach(), atol=1e-5)
    assert np.allclose(found.values, slopes(cosine.sum(), embedded) * mask, atol=1e-5)
    for pool, at in (("cls", [0, 0]), ("last", [8, 11])):
        ends = beside[torch.arange(2), [at[0] and 11, at[1]]]
        expected = cosine_similarity(states[torch.arange(2), at], ends).detach()
        assert np.allclose(
            regard.attribute(model, one, beside=other, pool=pool, method=PLAIN).score, expected, atol=1e-5
        )
    assert (deletion_error(model, one, found) > 0).all()  # what it was compared with is kept
    with pytest.raises(ValueError, match=r"beside \[3, 32\]"):
        regard.attribute(model, one, beside=torch.zeros(3, 32), method=PLAIN)
    with pytest.raises(ValueError, match="one number"):
        regard.attribute(model, one, beside=other, method="meta_saliency")
    with pytest.raises(ValueError, match="no embedding that could be compared"):
        regard.attribute(*build("bert"), beside=other, method=PLAIN)


def test_two_pictures_are_compared_by_what_the_model_pools():
    model = seeded(t.ViTModel(t.ViTConfig(**VISION)))
    one, other = pixels(), {"pixel_values": pixels(1)["pixel_values"].flip(3)}
    with torch.no_grad():
        expected = cosine_similarity(model(**one).pooler_output, model(**other).pooler_output)
    found = regard.attribute(model, one, beside=other, method="rollout")
    assert np.allclose(found.score, expected, atol=1e-5)
    assert found.dims == ("batch", "row", "column")


@pytest.mark.skipif(not MINILM.is_dir(), reason="needs the models that REGARD_MODELS names")
@pytest.mark.parametrize("method", ["integrated_gradients", "attention_x_gradient", "rollout", "grad_cam"])
def test_which_words_make_two_sentences_alike(method):
    model, tokenizer = regard.load(MINILM, dtype=torch.float32)
    pair = ["A man is playing a guitar.", "The guitar stood in the corner of the cold room."]
    one, other = (dict(tokenizer(sentence, return_tensors="pt")) for sentence in pair)
    with torch.no_grad():
        means = [model(**inputs).last_hidden_state.mean(1) for inputs in (one, other)]
    expected = float(cosine_similarity(*means))
    for a, b in ((one, other), (other, one)):
        found = regard.attribute(model, a, beside=b, method=method, processor=tokenizer, words=True)
        assert float(found.score[0]) == pytest.approx(expected, abs=1e-5)
        if method in ("integrated_gradients", "attention_x_gradient"):
            assert found.text[0, int(found[0].argmax("token"))] == "guitar"


# Positions, choices, contrasts, words


def test_the_token_that_is_masked_is_explained():
    model, inputs = build("bert")
    ids = inputs["input_ids"].clone()
    ids[0, 3] = ids[1, 7] = 2
    tokenizer = SimpleNamespace(
        mask_token_id=2, convert_ids_to_tokens=str, all_special_ids=[], convert_tokens_to_string="".join
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits[[0, 1], [3, 7]]
    found = regard.attribute(model, {"input_ids": ids}, method=PLAIN, processor=tokenizer)
    assert found.at.values.tolist() == [3, 7]
    assert found.target.values.tolist() == logits.argmax(-1).tolist()
    assert np.allclose(found.score, logits.amax(-1), atol=1e-5)
    told = regard.attribute(model, {"input_ids": ids}, at=[3, 7], method=PLAIN)
    assert np.array_equal(told.values, found.values)
    assert deletion_error(model, {"input_ids": ids}, found).shape == (2,)
    ids[0, 5] = 2
    with pytest.raises(ValueError, match="there are 2, 1 of them"):
        regard.attribute(model, {"input_ids": ids}, method=PLAIN, processor=tokenizer)
    for at in (12, -1, 0.5):
        with pytest.raises(ValueError, match="at "):
            regard.attribute(model, inputs, at=at, method=PLAIN)
    with pytest.raises(ValueError, match="one row of logits a sample"):
        regard.attribute(*build("vit"), at=3, method=PLAIN)


@pytest.mark.parametrize("method", OF_FEW)
@pytest.mark.parametrize("name", ["namer", "viewer", "reader"])
def test_methods_for_one_kind_of_model_refuse_others_in_words(method, name):
    model, processor = regard.load(name)
    pixels = {"pixel_values": torch.zeros(1, 3, 64, 64)}
    inputs = pixels if name == "viewer" else dict(processor("the baker sang", return_tensors="pt"))
    with pytest.raises(ValueError, match=rf"{method}.*{type(model).__name__}"):
        regard.attribute(model, inputs, 1, method=method)


@pytest.mark.filterwarnings("ignore:integrated_gradients")
@pytest.mark.parametrize("method", METHODS)
def test_choices(method):
    model = seeded(t.BertForMultipleChoice(t.BertConfig(**SIZES)))
    ids = torch.randint(3, 90, (2, 3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 2, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    knobs = FEW.get(method, {})
    if method in ("guided_grad_cam", "layerwise_relevance", "salient_relevance"):
        with pytest.raises(ValueError, match="BertForMultipleChoice"):
            regard.attribute(model, inputs, [0, 2], method=method)
        return
    found = regard.attribute(model, inputs, [0, 2], method=method, **knobs)
    assert found.dims == ("batch", "choice", "token")
    assert abs(found.values[0, 0]).max() > 0
    assert (found.values[1, 2, 5:] == 0).all()
    if method == "visual_precision_search":  # of a probability, which rests on all choices
        return
    assert (found.values[0, 1:] == 0).all()  # the logit of a choice rests on that choice
    assert (found.values[1, :2] == 0).all()
    if method != "rollout":
        both = regard.attribute(model, inputs, [0, 2], against=1, method=method, **knobs)
        assert abs(both.values[:, 1]).max() > 0
    if method == PLAIN:
        embedded = model.get_input_embeddings()(ids.flatten(0, 1)).detach().requires_grad_()
        score = model(inputs_embeds=embedded.unflatten(0, (2, 3)), attention_mask=mask).logits[0, 0]
        assert np.allclose(found.values[0], slopes(score, embedded)[:3], atol=1e-5)


@pytest.mark.parametrize("method", ["gradient_x_input", "integrated_gradients"])
@pytest.mark.filterwarnings("ignore:integrated_gradients")
def test_why_this_and_not_that_is_a_difference(method):
    model, tokenizer = regard.load("reader")
    inputs = dict(tokenizer("to be or not to", return_tensors="pt"))
    a, b = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" be", " me"))
    ask = lambda *which, **more: regard.attribute(model, inputs, *which, method=method, **more)  # noqa: E731
    ahead = ask(" be", against=" me", processor=tokenizer)
    one, other = ask(a), ask(b)
    assert np.allclose(ahead.values, one.values - other.values, atol=1e-3 * abs(one.values).max())
    assert float(ahead.score[0]) == pytest.approx(float(one.score[0] - other.score[0]), abs=1e-4)
    assert ahead.against.values.tolist() == [b]
    with predict(model, inputs, Question.of(ahead)) as prediction, torch.no_grad():
        assert float(prediction.score()) == pytest.approx(float(ahead.score[0]), abs=1e-4)
        assert float(prediction.probability()) == pytest.approx(1 / (1 + np.exp(-float(ahead.score[0]))), abs=1e-4)
    with pytest.raises(ValueError, match="the target itself"):
        ask(a, against=a)


@pytest.mark.filterwarnings("ignore:integrated_gradients")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["namer", "viewer"])
def test_contrasts_on_every_method(method, name):
    model, processor = regard.load(name)
    if name == "namer":
        inputs = dict(processor("with a heavy heart , the baker sang .", return_tensors="pt"))
    else:
        inputs = {"pixel_values": torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    knobs = {"steps": 2} if method == "visual_precision_search" else {}
    try:
        plain = regard.attribute(model, inputs, 1, method=method, **knobs)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).split()[0]):
            regard.attribute(model, inputs, 1, against=0, method=method, **knobs)
        return
    ahead = regard.attribute(model, inputs, 1, against=0, method=method, **knobs)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    assert float(ahead.score[0]) == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
    assert np.allclose(ahead.values, plain.values) == (not ahead.attrs.get("knows_target", True))  # as rollout
    assert (method == "rollout") == (not plain.attrs.get("knows_target", True))


@pytest.mark.parametrize("method", ["seg_token", "vl_sam"])
def test_methods_of_patches_know_no_target_and_say_so(method):
    model, processor = regard.load("describer")
    scene = Scene((Object("star", "red", "large", 0.3, 0.5),))
    inputs = asked(processor, [render(scene).image()], ["what colour is the star ?"])
    one = regard.attribute(model, inputs, "red", method=method, processor=processor)
    other = regard.attribute(model, inputs, "red", against="blue", method=method, processor=processor, words=True)
    assert one.attrs["knows_target"] is False
    assert "against" in other.coords
    assert float(one.sum()) == pytest.approx(float(other.sum()), abs=1e-6)
    assert float(one.score[0]) > float(other.score[0])


def test_words():
    tokens = ["<s>", " un", "believ", "able", ",", " it", "'s", " 3", "rd", "</s>"]
    parts = ["".join(tokens[span]) for span in spans(tokens, {"<s>", "</s>"}, True)]
    assert parts == ["<s>", " unbelievable", ",", " it's", " 3rd", "</s>"]
    pieces = ["[CLS]", "play", "##ing", "a", "gui", "##tar", ".", "[SEP]"]
    assert ["".join(pieces[span]) for span in spans(pieces, {"[CLS]", "[SEP]"}, False)] == [
        "[CLS]", "play##ing", "a", "gui##tar", ".", "[SEP]",
    ]  # fmt: skip
    assert spans(["the", "sailor"], (), False) == [slice(0, 1), slice(1, 2)]
    values = np.arange(16.0).reshape(2, 8)
    texts = np.array([pieces, ["[CLS]", "a", "b", "c", "d", "e", "f", "[SEP]"]])
    coordinates = {"text": (("batch", "token"), texts), "id": (("batch", "token"), values.astype(int))}
    found = regard.attribution.xr.DataArray(values, coordinates, ("batch", "token"), "x", {"long_name": "x"})
    tokenizer = SimpleNamespace(all_special_tokens=["[CLS]", "[SEP]"], get_vocab=lambda: {"play": 0, "##ing": 1})
    whole = joined(found, tokenizer)
    assert whole.values[0].tolist() == [0, 1 + 2, 3, 4 + 5, 6, 7, 0, 0]
    assert whole.text.values[0].tolist() == ["[CLS]", "playing", "a", "guitar", ".", "[SEP]", "", ""]
    assert whole.id.values[0].tolist() == [0, 1, 3, 4, 6, 7, -1, -1]
    assert whole.values[1].tolist() == values[1].tolist()
    with pytest.raises(ValueError, match="no words to join"):
        joined(found.drop_vars("text"), tokenizer)


def test_bytes_of_characters_are_joined_to_words():
    reader, tokenizer = regard.load("reader")
    inputs = dict(tokenizer("日本語の文 naïve 🙂 word", return_tensors="pt"))
    found = regard.attribute(reader, inputs, method=PLAIN, processor=tokenizer)
    assert any("\ufffd" in str(text) for text in found.text.values[0])  # what is joined here
    words = regard.attribute(reader, inputs, method=PLAIN, processor=tokenizer, words=True)
    texts = [str(text).strip() for text in words.text.values[0]]
    assert {"日本語の文", "naïve", "🙂", "word"} <= set(texts)
    assert float(words.sum()) == pytest.approx(float(found.sum()), abs=1e-6)


@pytest.mark.filterwarnings("ignore:integrated_gradients")
@pytest.mark.parametrize("method", [m for m in METHODS if "relevance" not in m and "guided" not in m])
def test_scores_of_words_add_up_on_every_method(method):
    model, tokenizer = regard.load("reader")
    inputs = dict(tokenizer("the unbelievable harlequin stood", return_tensors="pt"))
    knobs = FEW.get(method, {})
    pieces = regard.attribute(model, inputs, 5, method=method, processor=tokenizer, **knobs)
    words = regard.attribute(model, inputs, 5, method=method, processor=tokenizer, words=True, **knobs)
    assert words.sizes["token"] < pieces.sizes["token"]
    assert float(words.sum()) == pytest.approx(float(pieces.sum()), abs=1e-6)
    assert [str(w).strip() for w in words.text.values[0][-2:]] == ["harlequin", "stood"]
    with pytest.raises(ValueError, match="needs the processor"):
        regard.attribute(model, inputs, 5, method=method, words=True)


# Pictures, sound, and models that are not transformers'


class Classifier(nn.Module):
    """Takes its pictures by another name, and gives a bare tensor; channels stand last inside, on request."""

    def __init__(self, last=False):
        super().__init__()
        self.conv, self.act, self.out = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Linear(5, 4)
        self.turned = nn.Identity()
        self.last = last

    def forward(self, image):
        hidden = self.act(self.conv(image))
        hidden = self.turned(hidden.movedim(1, 3) if self.last else hidden)
        return self.out(hidden.mean((1, 2) if self.last else (2, 3)))


@pytest.mark.parametrize("key", ["pixel_values", "image"])
def test_a_plain_module_that_takes_pixels(key):
    model = seeded(Classifier())
    inputs = {key: torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    for method in METHODS:
        if method in ("rollout", "attention_x_gradient", "salient_relevance"):
            continue
        found = regard.attribute(model, inputs, method=method)
        assert found.shape == (2, 8, 8)
        assert found.target.values.tolist() == model(inputs[key]).argmax(-1).tolist()
    assert deletion_error(model, inputs, found).shape == (2,)
    assert infidelity_error(model, inputs, found, samples=4).shape == (2,)
    for method in ("rollout", "attention_x_gradient"):
        with pytest.raises(ValueError, match="Classifier has no attention to read"):
            regard.attribute(model, inputs, method=method)
    with pytest.raises(ValueError, match="no class 'cat'; give its number"):
        regard.attribute(model, inputs, "cat")


def test_a_layer_with_its_channels_last_is_read_the_right_way_round():
    inputs = {"image": torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))}
    for method in ("grad_cam", "normgrad"):
        maps = [regard.attribute(seeded(Classifier(last)), inputs, 1, method=method) for last in (False, True)]
        assert np.allclose(maps[0].values, maps[1].values, atol=1e-6)
        assert maps[0].values.std() > 0


def test_gradients_that_relus_guide_are_captums():
    model = seeded(Classifier())
    inputs = {"image": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    with predict(model, inputs, 2) as prediction:
        ours = guided(prediction)
    with pytest.warns(UserWarning, match="hooks"):
        theirs = GuidedBackprop(model).attribute(inputs["image"].clone().requires_grad_(), 2)
    assert torch.allclose(ours, theirs, atol=1e-7)
    assert not model.act._forward_hooks


@pytest.mark.filterwarnings("ignore:integrated_gradients")
@pytest.mark.parametrize("method", METHODS)
def test_windowed_attention_is_explained_or_refused_in_words(method):
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    model = seeded(t.SwinForImageClassification(t.SwinConfig(image_size=64, patch_size=4, num_labels=5, **sizes)))
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    if method in ("rollout", "attention_x_gradient"):
        with pytest.raises(ValueError, match="SwinForImageClassification attends within windows"):
            regard.attribute(model, inputs, 1, method=method)
    elif method in ("guided_grad_cam", "layerwise_relevance", "salient_relevance"):
        with pytest.raises(ValueError, match="SwinForImageClassification"):
            regard.attribute(model, inputs, 1, method=method)
    else:
        knobs = FEW.get(method, {})
        assert regard.attribute(model, inputs, 1, method=method, **knobs).shape == (2, 64, 64)


@pytest.mark.parametrize("method", ["rollout", "attention_x_gradient"])
def test_a_pyramid_of_layers_is_refused_in_words(method):
    config = t.SegformerConfig(hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 2, 2, 2], depths=[1, 1, 1, 1])
    model = seeded(t.SegformerForImageClassification(config))
    with pytest.raises(ValueError, match="layers of 256, 64, 16, 4 positions look at 4, so their weights do not chain"):
        regard.attribute(model, {"pixel_values": torch.randn(2, 3, 64, 64)}, 1, method=method)


def test_sound_and_film():
    sizes = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "num_labels": 3}
    model = seeded(t.Wav2Vec2ForSequenceClassification(t.Wav2Vec2Config(**SIZES, **sizes)))
    wave = torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))
    given = wave.clone().requires_grad_()
    expected = torch.autograd.grad(model(given).logits[:, 2].sum(), given)[0] * wave
    found = regard.attribute(model, {"input_values": wave}, 2, method=PLAIN)
    assert np.allclose(found.values, expected, atol=1e-6)
    assert regard.attribute(model, {"input_values": wave}, 2, method="rollout").shape == (2, 1600)
    model = seeded(t.VideoMAEForVideoClassification(t.VideoMAEConfig(**VISION, num_frames=4, num_labels=3)))
    film = {"pixel_values": torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    found = regard.attribute(model, film, 2, method=PLAIN)
    assert found.dims == ("batch", "step", "row", "column")
    with pytest.raises(ValueError, match="no places in pixel_values"):
        regard.attribute(model, film, 2, method="grad_cam")


def test_patches_among_tokens_have_their_row_and_column():
    model, inputs = build("llava")
    found = regard.attribute(model, inputs, method=PLAIN)
    patches = (inputs["input_ids"] == 98).numpy()
    assert (found.image.values == np.where(patches, 0, -1)).all() or found.image.values[1][patches[1]].tolist() == [
        1
    ] * 16
    for name, order in (("row", np.arange(16) // 4), ("column", np.arange(16) % 4)):
        assert found[name].values[0][patches[0]].tolist() == order.tolist()
        assert (found[name].values[~patches] == -1).all()
    pixel = regard.attribute(model, inputs, over="pixel_values", method=PLAIN)
    assert pixel.shape == (2, 16, 16)
    assert "row" not in regard.attribute(*build("clip"), method=PLAIN).coords


def test_other_outputs_by_name():
    model = seeded(t.BertForQuestionAnswering(t.BertConfig(**SIZES)))
    with pytest.raises(ValueError, match=r"say with output= which is meant, start_logits or end_logits"):
        regard.attribute(model, text(), method=PLAIN)
    found = regard.attribute(model, text(), output="end_logits", method=PLAIN)
    assert found.target.values.tolist() == model(**text()).end_logits.argmax(-1).tolist()
    assert deletion_error(model, text(), found).shape == (2,)


def test_an_error_of_the_model_is_told_with_what_it_was_given():
    model, inputs = build("clip")
    with pytest.raises(ValueError, match="CLIPModel could not run on input_ids: "):
        regard.attribute(model, {"input_ids": inputs["input_ids"]}, method=PLAIN)
    assert all(p.requires_grad for p in model.parameters())
