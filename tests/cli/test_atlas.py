"""The head atlas: heads that were set by hand are found, others are not called so; every family; the stream."""

from __future__ import annotations

from html import unescape

import numpy as np
import pytest
import torch
import transformers as t
from families import FAMILIES, build
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import regard
from regard import atlas as module
from regard import catalog, stream, zoo
from regard.atlas import SCORES, STAGES, TAXONOMY, atlas, best
from regard.cli import app
from regard.data import prompts
from regard.zoo.recipes.reader import HEAD, WIDTH, head_start

BOS = 0


@pytest.fixture(scope="module")
def hand_set():
    """A Llama of two layers: previous token (0, 0), sink (0, 4), local (0, 6), induction (1, 0) and (1, 2), suppression
    (1, 4), self (1, 6); the rest is noise."""
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        head_dim=HEAD,
        intermediate_size=32,
        attention_bias=True,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = t.LlamaForCausalLM(config).eval()
    head_start(model)
    first, second = (layer.self_attn for layer in model.model.layers)
    slow = 15  # the slowest rotary pair hardly turns; the fast ones tell places apart
    with torch.no_grad():
        at = slice(4 * HEAD, 5 * HEAD)
        key = slice(2 * HEAD, 3 * HEAD)
        sign = model.model.embed_tokens.weight[BOS]
        first.q_proj.weight[at] = first.k_proj.weight[key] = 0.0
        first.q_proj.bias[4 * HEAD + slow] = 12.0
        first.k_proj.weight[2 * HEAD + slow] = sign / sign.norm()  # a normed embedding is sqrt(160) long
        # A head whose scores fall with the distance from three places back, and one that peaks at the query itself.
        turns = 3 * 10000.0 ** (-torch.arange(1, 7) / (HEAD // 2))
        ahead, back, here = torch.zeros(3, HEAD)
        ahead[1:7] = 3.5
        back[1:7], back[HEAD // 2 + 1 : HEAD // 2 + 7] = 3.5 * turns.cos(), -3.5 * turns.sin()
        here[:5] = 9.0
        for attention, asks, answers in ((first, back, ahead), (second, here, here)):
            at, key = slice(6 * HEAD, 7 * HEAD), slice(3 * HEAD, 4 * HEAD)
            attention.q_proj.weight[at] = attention.k_proj.weight[key] = 0.0
            attention.q_proj.bias[at], attention.k_proj.bias[key] = asks, answers
        turned = torch.linalg.qr(torch.randn(WIDTH, HEAD))[0].T
        second.v_proj.weight[2 * HEAD : 3 * HEAD] = turned
        second.o_proj.weight[:, 4 * HEAD : 5 * HEAD] = -0.3 * turned.T
    return model


@pytest.fixture(scope="module")
def found(hand_set):
    return atlas(hand_set).tree["language_model"].to_dataset()


@pytest.mark.parametrize(
    ("kind", "heads"),
    {
        "previous token": {(0, 0)},
        "sink": {(0, 4)},
        "local": {(0, 0), (0, 6), (1, 6)},
        "induction": {(1, 0), (1, 2)},
        "copying": {(1, 0), (1, 2)},
        "suppression": {(1, 4)},
        "self": {(1, 6)},
        "duplicate": set(),
    }.items(),
)
def test_heads_set_by_hand_are_found_and_no_others(found, kind, heads):
    assert {(layer, head) for layer, head, _ in best(found, kind)} == heads


def test_what_is_the_same_whatever_is_read(found):
    positional = {(layer, head) for layer, head, _ in best(found, "positional")}
    assert positional >= {(0, 0), (0, 4), (0, 6), (1, 6)}
    assert not positional & {(1, 0), (1, 2)}


def test_a_head_carries_the_stage_of_its_kinds(found):
    assert "latent reasoning" in str(found["stages"].sel(layer=1, head=0).values)
    assert str(found["stages"].sel(layer=0, head=0).values) == "in-context identification"
    assert str(found["kinds"].sel(layer=1, head=6).values) == "positional, self, local"
    assert {kind.stage for kind in TAXONOMY.values()} <= {"", *STAGES}
    assert {name for kind in TAXONOMY.values() for name in kind.scores} <= set(SCORES)


def test_the_effect_of_copying_is_on_the_logit_of_what_is_looked_at(found):
    effect = found["direct_effect"]
    assert effect.sel(layer=1, head=0) > 0.05
    assert abs(float(effect.sel(layer=1, head=0))) > 5 * abs(float(effect.sel(layer=1, head=3)))


def test_thresholds_are_knobs(hand_set, found):
    again = atlas(hand_set, thresholds={"induction": 1.1, "duplicate_token": 0.0}).tree["language_model"].to_dataset()
    assert not best(again, "induction")
    assert len(best(again, "duplicate")) == 16
    assert again["induction"].attrs["threshold"] == 1.1
    np.testing.assert_allclose(again["induction"], found["induction"])  # the same seed, the same battery
    with pytest.raises(ValueError, match="no score inductoin; scores are"):
        atlas(hand_set, thresholds={"inductoin": 0.1})


def test_the_model_is_left_as_it_was(hand_set):
    before = {name: tensor.clone() for name, tensor in hand_set.state_dict().items()}
    hand_set.train()
    list(hand_set.modules())[-1].eval()  # a part that is held still while the rest is trained
    modes = [m.training for m in hand_set.modules()]
    try:
        atlas(hand_set, sequences=2)
        assert hand_set.training
        assert [m.training for m in hand_set.modules()] == modes
        assert all(torch.equal(before[name], tensor) for name, tensor in hand_set.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in hand_set.modules())
        with pytest.raises(IndexError), torch.no_grad():
            atlas(hand_set, Broken())
        assert hand_set.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in hand_set.modules())
    finally:
        hand_set.eval()


class Broken:
    """A tokenizer whose ids the model does not have."""

    all_special_ids = ()

    def __len__(self):
        return 300

    def convert_ids_to_tokens(self, i):
        return str(i)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def __call__(self, *_, **__):
        return {"input_ids": torch.full((1, 3), 10_000)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_or_why_not(family):
    model, _ = build(family)
    if family == "whisper":
        with pytest.raises(ValueError, match="takes input_features: the battery has tokens and pictures only"):
            atlas(model)
        return
    tree = atlas(model, sequences=3, segment=10).tree
    heads = {stack: node.sizes for stack, node in tree.children.items()}
    assert heads
    reads = family != "vit"
    for node in tree.children.values():
        for name, score in node.data_vars.items():
            assert score.dims == ("layer", "head")
            low, high = SCORES[name].limits
            assert low is None or float(score.min()) >= low - 1e-6 or score.isnull().all(), name
            assert high is None or float(score.max()) <= high + 1e-6 or score.isnull().all(), name
    written = any(node["copying"].notnull().any() for node in tree.children.values() if "copying" in node)
    assert written == (not any("not read" in note for note in tree.attrs["notes"])) or not reads
    if family in ("vit", "clip"):
        seeing = tree["encoder" if family == "vit" else "vision_model"]
        assert {"cls", "self_mass", "positional"} == set(seeing.data_vars)  # patches have no order
    if family in ("gemma2", "gemma3", "bert", "t5", "bart"):
        assert "what heads write was not read" in tree.attrs["notes"][0]


def test_the_battery_of_a_model_that_sees(folders, picture):
    for kind in ("llava", "vit"):
        loaded = regard.load(folders[kind])
        tree = atlas(*loaded, pictures=[Image.open(picture)], sequences=2).tree
        generated = atlas(*loaded, sequences=2).tree
        assert list(tree.children) == list(generated.children)
    node = atlas(*regard.load(folders["llava"]), sequences=2).tree["language_model"]
    assert node["to_image"].notnull().all()
    assert node["in_image"].notnull().all()
    assert generated["encoder"]["positional"].notnull().all()


def test_attention_to_pictures_worked_by_hand():
    """bos, three patches, two words: the words give 0.6 and 0.2 to the picture."""
    from regard.call import Call, Site
    from regard.tokens import Tokens

    rows = torch.full((6, 6), 1 / 6)
    rows[4] = torch.tensor([0.4, 0.5, 0.05, 0.05, 0.0, 0.0])
    rows[5] = torch.tensor([0.7, 0.2, 0.0, 0.0, 0.0, 0.1])
    score = (rows + 1e-30).log()[None, None]
    one = torch.eye(6)[None, None]
    tokens = Tokens.plain("text", 1, 6).marked("image", torch.tensor([[False, True, True, True, False, False]]))
    call = Call(Site("a", "language_model", 0), score, one, one, 1.0, tokens=tokens, query_tokens=tokens)
    assert module._to_image(call)[0, 0, 4:].tolist() == pytest.approx([0.6, 0.2])
    assert module._to_image(call)[0, 0, :4].isnan().all()
    assert float(module._in_image(call)) == pytest.approx(1.0)  # 0.7 of 0.8, no more than 5 times the average third
    many = torch.cat([torch.eye(9), torch.eye(9)[:1]])  # nine patches, one word that looks at the first alone
    score, one = (many + 1e-30).log()[None, None], torch.eye(9)[None, None]
    image = Tokens.plain("image", 1, 9)
    asks = image.then(Tokens.plain("text", 1, 1))
    call = Call(Site("a", "language_model", 0), score, one, one, 1.0, tokens=image, query_tokens=asks)
    assert float(module._in_image(call)) == pytest.approx(0, abs=1e-9)  # all of it on a sink


def test_prompts_are_answered_where_the_tokenizer_encodes_them():
    asked = [*prompts.ioi(6), *prompts.coloured_objects(6)]
    vocabulary = prompts.vocabulary(asked, ("<pad>", "<bos>", "<unk>"))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = t.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    model = t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=len(vocabulary), **sizes, bos_token_id=1, eos_token_id=None)
    ).eval()
    tree = atlas(model, tokenizer, prompted=6, sequences=2).tree
    found = tree["language_model"]
    assert not any("prompts" in note for note in tree.attrs["notes"])

    # by hand, for one head: weight of the last token on the answer's, and the logits with the head's part taken out
    weight, effect = [], []
    for prompt in asked:
        name = "IO" if prompt.task == "ioi" else "COL"
        encoded = prompts.encode(prompt, tokenizer)
        with torch.no_grad(), regard.record(model, "rows") as recording:
            states = model(torch.tensor([encoded.ids]), output_hidden_states=True)
        rows = recording.tree["language_model"]["rows"].sel(layer=1, head=2).values[0, -1]
        weight.append(rows[list(encoded.positions[name])].sum())
        block = model.transformer.h[1]
        normed = block.ln_1(states.hidden_states[1])
        value = block.attn.c_attn(normed).split(32, dim=2)[2][0, :, 16:24]
        part = torch.from_numpy(rows) @ value @ block.attn.c_proj.weight[16:24]
        end = {}
        hook = model.transformer.ln_f.register_forward_pre_hook(lambda _, args, end=end: end.update(x=args[0]))
        model(torch.tensor([encoded.ids]))
        hook.remove()
        with torch.no_grad():
            full, less = (model.lm_head(model.transformer.ln_f(x)) for x in (end["x"][0, -1], end["x"][0, -1] - part))
        lost = full - less
        effect.append(float(lost[encoded.answers].mean() - lost[encoded.distractors].mean()))
    assert float(found["to_answer"].sel(layer=1, head=2)) == pytest.approx(np.mean(weight), abs=1e-5)
    assert float(found["answer_effect"].sel(layer=1, head=2)) == pytest.approx(np.mean(effect), abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gpt_oss"])
def test_heads_and_their_layers_add_up_to_the_stream(family):
    """Without feed-forward layers the stream is the embedding, each head's part, and the biases."""
    model, inputs = build(family)
    kept = []

    @regard.statistic("batch", title="Keeps")
    def keep(call):
        kept.append(call)

    def run():
        return model(**inputs).logits

    for name, part in model.named_modules():
        if name.endswith(("mlp", ".experts")):
            part.register_forward_hook(lambda _, args, output: _scaled(output))
    flow = stream.read(model, run)
    assert not flow.missing
    with torch.no_grad(), regard.record(model, keep):
        logits = run()
    biases = [getattr(m, "bias", None) for m in flow.writes.values()]
    with torch.no_grad():
        total = sum(flow.written(c.site, h, c.output[:, h]) for c in kept for h in range(c.query.shape[1]))
        total = total + sum(b for b in biases if b is not None)
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        if family == "gpt2":
            embedded = embedded + model.transformer.wpe.weight[:12]
        torch.testing.assert_close(total + embedded, flow.residual, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(flow.out(flow.residual), logits, atol=1e-3, rtol=1e-3)
        alone = flow.alone(flow.residual)
        torch.testing.assert_close(alone, flow.alone(3 * flow.residual), atol=1e-3, rtol=1e-3)  # a direction
        offset = flow.out(torch.zeros_like(flow.residual[0, 0]))
        torch.testing.assert_close(alone + offset, logits, atol=1e-3, rtol=1e-3)


def _scaled(output):
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


def test_what_does_not_add_up_is_not_read():
    for family, why in (
        ("gemma2", "does not simply add up"),
        ("bert", "last norm is not given"),
        ("albert", "no unembedding"),
        ("t5", "does not come out of a norm"),
    ):
        model, inputs = build(family)
        flow = stream.read(model, lambda model=model, inputs=inputs: model(**inputs))
        assert why in flow.missing
        with pytest.raises(ValueError, match="no logits"):
            flow.out(torch.zeros(1, 32))


def test_the_known_heads_of_the_reader():
    card = zoo.measured("reader")
    card = card.get("abilities", card)
    node = atlas(*regard.load("reader")).tree["language_model"]
    for name, kind in (("previous_token", "previous token"), ("induction", "induction")):
        at = {"layer": card[name]["layer"], "head": card[name]["head"]}
        assert kind in str(node["kinds"].sel(at).values)
        assert TAXONOMY[kind].stage in str(node["stages"].sel(at).values)
        # two heads are nearly alike, and the card counts one copy where the atlas counts all
        assert float(node[name].sel(at)) > float(node[name].max()) - 0.05


def test_the_command_writes_a_recording_and_a_report(folders, tmp_path):
    run = CliRunner().invoke
    done = run(app, ["atlas", str(folders["gpt2"]), "--out", str(tmp_path), "--threshold", "local_mass=0"])
    assert done.exit_code == 0, done.output
    assert "prompts do not fit the tokenizer" in done.output.replace("\n", " ")
    again = regard.open(tmp_path / "atlas.zarr").tree["language_model"]
    assert "local" in str(again["kinds"].values[0, 0])
    assert again["local_mass"].attrs["threshold"] == 0
    page = (tmp_path / "atlas.html").read_text()
    assert "looks near by" in page
    assert '"kinds":[["' in page
    for wrong in ("local_mass", "local_mass=a", "near=1"):
        assert run(app, ["atlas", str(folders["gpt2"]), "--out", str(tmp_path), "--threshold", wrong]).exit_code == 2


def test_tags_are_browsed():
    run = CliRunner().invoke
    listed = run(app, ["papers", "--tag", "sinks", "--tag", "sink-interpretation"], env={"COLUMNS": "200"})
    assert "secondary-sinks" in listed.output
    assert "gated-attention" not in listed.output
    assert "no tag 'sink'" in run(app, ["papers", "--tag", "sink"]).output
    tags = run(app, ["papers", "tags"], env={"COLUMNS": "200"})
    assert all(tag in tags.output for tag in catalog.tags())
    assert {stage.replace(" ", "-") for stage in STAGES} <= set(catalog.tags())


def test_kinds_of_prose_are_refused_where_its_words_are_unknown(tmp_path):
    done = CliRunner().invoke(app, ["atlas", "namer", "--out", str(tmp_path)], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    said = "of the paragraph's tokens are unknown to the tokenizer, so it is no prose: not measured are the kinds self"
    assert said in " ".join(done.output.split())
    tree = regard.open(tmp_path / "atlas.zarr").tree
    scores = set(tree["encoder"].data_vars)
    assert {"induction", "previous_token"} <= scores
    assert not {"self_mass", "sink_mass", "local_mass", "global_mass", "normalised_entropy", "rows"} & scores
    assert said in unescape((tmp_path / "atlas.html").read_text())
    known = atlas(*regard.load("reader")).tree  # knows the words
    assert "sink_mass" in known["language_model"]
    assert not any("unknown" in note for note in known.attrs["notes"])
