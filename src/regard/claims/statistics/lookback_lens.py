"""A model that knows a biography of each subject is told another one: does its attention betray which it recites?

A stand-in for the paper's summaries and answers in which the truth is known without a judge. The first three layers of
the zoo's reader, which copy, are trained here on documents that tell facts of four subjects, six tokens each, and then
answer from them. In this training answers go over, at a random token, into what is remembered of the subject; the
better known a subject, the more often. So the trained model hallucinates by itself. Two tasks: `question` asks for one
subject, `summary` goes through three. An answer is grounded where it says of its subject what the document says. Spans
are given, the easier of the paper's two settings; a chunk of guided decoding is as long as a subject and its fact. The
control is guided by lenses that were fitted on shuffled labels, one for each text: a single one leans to one side by
chance. Three worlds and lengths of training were tried, on other seeds. An earlier form also took for granted that
greedy decoding is no better than sampling, and could not tell where it was. The paper does not: it asks that guidance
be better than greedy decoding, which is the harder the better that is.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import zoo
from ...catalog import Finding, Premise
from ...seam import record
from ...statistics.lookback_lens import LookbackLens, Span, guided_decoding, span_features
from ...statistics.lookback_ratio import lookback_ratio
from .._measure import mean

SCALES = "small", "large"
SUBJECTS, VALUES, KNOWN = 16, 40, 0.65
LENGTH, TOLD, ANSWERED = 6, 4, {"question": 1, "summary": 3}  # tokens of a fact; subjects of a document, of an answer
BOS, CUE, SUBJECT = 0, {"question": 1001, "summary": 1002}, 1003  # ids: subjects, then values, are ordinary tokens
VALUE = SUBJECT + SUBJECTS
LAYERS, STEPS, BATCH, RATE = 3, 450, 24, 1e-3
SAMPLING = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
TEXTS = {"small": (400, 40), "large": (2000, 200)}  # of each task; continued with guidance

EXPECTED = (
    "on texts not seen, the AUROC of the detector on lookback ratios is at most 0.05 below that of the one on hidden "
    "states, and at least 0.8 on the task that it was not fitted on; guided decoding leaves fewer hallucinated answers "
    "than sampling, than greedy decoding and than with lenses of shuffled labels, each by two standard errors"
)


class Documents(NamedTuple):
    ids: Tensor  # [text, token], with the answer
    prompt: int  # tokens before the answer
    cue: int  # position of the first token that counts as new
    subjects: Tensor  # [text, subject], those that the document is about
    facts: Tensor  # [text, subject, token], what it says of them


class World:
    """What the model remembers, and documents that contradict it."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.remembered = torch.randint(VALUE, VALUE + VALUES, (SUBJECTS, LENGTH), generator=self.generator)
        self.known = KNOWN * (torch.arange(SUBJECTS) % 2)  # how often an answer comes from memory

    def documents(self, n: int, task: str) -> Documents:
        g = self.generator
        subjects = torch.rand(n, SUBJECTS, generator=g).argsort(1)[:, :TOLD]
        facts = torch.randint(VALUE, VALUE + VALUES, (n, TOLD, LENGTH), generator=g)
        told = torch.cat([SUBJECT + subjects[..., None], facts], dim=2).flatten(1)
        # In any order: otherwise every fact would stand as far back, and position alone would find it.
        asked = torch.rand(n, TOLD, generator=g).argsort(1)[:, : ANSWERED[task]]
        about = subjects.gather(1, asked)
        drifts = torch.rand(about.shape, generator=g) < self.known[about]
        supported = facts.gather(1, asked[..., None].expand(-1, -1, LENGTH))
        answers = torch.where(drifts[..., None], self.remembered[about], supported)
        said = torch.cat([SUBJECT + about[..., None], answers], dim=2).flatten(1)
        ids = torch.cat([torch.full((n, 1), BOS), told, torch.full((n, 1), CUE[task]), said], dim=1)
        cue = 1 + told.shape[1]
        return Documents(ids, cue + (1 if task == "summary" else 2), cue, subjects, facts)


class Sampled(NamedTuple):
    """Answers that the model gave, described."""

    ratios: Tensor  # [answer, layer, head]
    hidden: Tensor  # [layer, answer, dim]
    grounded: np.ndarray  # [answer]
    fresh: np.ndarray  # [answer], of the texts that detectors are not fitted on


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """A linear detector on lookback ratios matches one on hidden states, transfers, and guides decoding."""
    n, guided = TEXTS[scale]
    world = World(seed)
    model = _trained(world, seed)
    answers = {task: _answers(model, world.documents(n, task), task) for task in CUE}
    grounded = {task: float(found.grounded.mean()) for task, found in answers.items()}
    both = Premise(
        "some answers are grounded, some are not",
        "20% to 80% grounded",
        " and ".join(f"{share:.0%} of a {task}'s" for task, share in grounded.items()),
        all(0.2 <= share <= 0.8 for share in grounded.values()),
    )
    if not all(0 < share < 1 for share in grounded.values()):
        return Finding(None, "no detector can be fitted", EXPECTED, seed, premises=[both])
    auroc, lenses = _detectors(answers)
    of = answers["summary"]
    fitted, truth = of.ratios[~of.fresh], of.grounded[~of.fresh]
    blind = [
        LookbackLens.fit(fitted, truth[torch.randperm(len(truth), generator=world.generator).numpy()])
        for _ in range(guided)
    ]

    documents = world.documents(guided, "summary")
    wrong = {"greedy": _wrong(documents, _written(model, documents, do_sample=False))}
    for name, of_text, candidates in (
        ("sampled", [lenses["summary"]] * guided, 1),
        ("guided", [lenses["summary"]] * guided, 8),
        ("guided by the lens of questions", [lenses["question"]] * guided, 8),
        ("guided by lenses of shuffled labels", blind, 8),
    ):
        rows = [
            guided_decoding(
                model,
                {"input_ids": ids[None, : documents.prompt]},
                of_text[i],
                candidates=candidates,
                chunk=1 + LENGTH,
                max_new_tokens=len(ids) - documents.prompt,
                start=documents.cue,
                seed=seed + i,
            ).ids
            for i, ids in enumerate(documents.ids)
        ]
        wrong[name] = _wrong(documents, torch.stack(rows))

    others = ("sampled", "greedy", "guided by lenses of shuffled labels")
    fewer = {name: mean(wrong[name] - wrong["guided"]) for name in others}
    holds = (
        all(a["lookback ratios"] >= a["hidden states"] - 0.05 for a in auroc.values())
        and all(a["lens of the other task"] >= 0.8 for a in auroc.values())
        and all(difference.above() for difference in fewer.values())
    )
    figures = "; ".join(
        f"{task}: AUROC {a['lookback ratios']:.2f} (hidden states {a['hidden states']:.2f}, "
        f"lens of the other task {a['lens of the other task']:.2f})"
        for task, a in auroc.items()
    )
    shares = ", ".join(f"{share.mean():.0%} {name}" for name, share in wrong.items())
    less = ", ".join(f"{name} {difference:.2f}" for name, difference in fewer.items())
    measured = f"{figures}. Hallucinated answers in {guided} summaries: {shares}; guided has fewer by: {less}"
    return Finding(
        holds, measured, EXPECTED, seed, premises=[both], draw=partial(_draw, answers["summary"], auroc, wrong)
    )


def _trained(world: World, seed: int) -> Any:
    """The reader's first layers, trained on documents with their answers."""
    torch.manual_seed(seed)
    model, _ = zoo.load("reader")
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    warm, decay = 20, 0.4 * STEPS
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / warm, (STEPS - step) / decay)
        documents = world.documents(BATCH, "summary" if step % 2 else "question")
        labels = documents.ids.masked_fill(torch.arange(documents.ids.shape[1]) < documents.prompt, -100)
        model(documents.ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def _written(model: Any, documents: Documents, **sampling: Any) -> Tensor:
    """What the model answers. [text, token]"""
    prompts = documents.ids[:, : documents.prompt]
    n = documents.ids.shape[1] - documents.prompt
    whole = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, **sampling)
    return whole[:, documents.prompt :]


def _grounded(documents: Documents, written: Tensor) -> Tensor:
    """Which answers say of their subject what the document says. [text, answer]"""
    said = torch.cat([documents.ids[:, : documents.prompt], written], dim=1)[:, documents.cue + 1 :]
    said = said.unflatten(1, (-1, 1 + LENGTH))
    same = said[:, :, None, 0] == SUBJECT + documents.subjects[:, None]
    return (same & (said[:, :, None, 1:] == documents.facts[:, None]).all(-1)).any(-1)


def _wrong(documents: Documents, written: Tensor) -> np.ndarray:
    """Share of hallucinated answers. [text]"""
    return 1 - _grounded(documents, written).double().mean(1).numpy()


@torch.inference_mode()
def _answers(model: Any, documents: Documents, task: str) -> Sampled:
    """Sample an answer to each document, and describe it."""
    written = _written(model, documents, **SAMPLING)
    whole = torch.cat([documents.ids[:, : documents.prompt], written], dim=1)
    with record(model, ratio=partial(lookback_ratio, start=documents.cue)) as recording:
        states = model(whole, output_hidden_states=True).hidden_states
    starts = [documents.cue + 2 + k * (1 + LENGTH) for k in range(ANSWERED[task])]
    spans = [Span(text, start, start + LENGTH) for text in range(len(whole)) for start in starts]
    return Sampled(
        span_features(recording.tree["language_model"]["ratio"], spans),
        torch.stack([torch.stack([layer[s.batch, s.start : s.stop].mean(0) for s in spans]) for layer in states[1:]]),
        _grounded(documents, written).flatten().numpy(),
        np.array([s.batch >= len(whole) // 2 for s in spans]),
    )


def _detectors(answers: dict[str, Sampled]) -> tuple[dict[str, dict[str, float]], dict[str, LookbackLens]]:
    """AUROC of each detector on answers not seen, task -> detector -> 0 to 1; and the lenses."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    lenses = {t: LookbackLens.fit(a.ratios[~a.fresh], a.grounded[~a.fresh]) for t, a in answers.items()}
    auroc: dict[str, dict[str, float]] = {}
    for task, found in answers.items():
        truth = found.grounded[found.fresh]
        other = next(t for t in answers if t != task)
        probes = []
        for layer in found.hidden:  # the best layer counts
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(layer[~found.fresh].numpy(), found.grounded[~found.fresh])
            probes.append(roc_auc_score(truth, probe.decision_function(layer[found.fresh].numpy())))
        auroc[task] = {
            "hidden states": max(probes),
            "lookback ratios": roc_auc_score(truth, lenses[task].score(found.ratios[found.fresh])),
            "lens of the other task": roc_auc_score(truth, lenses[other].score(found.ratios[found.fresh])),
        }
    return auroc, lenses


def _draw(found: Sampled, auroc: dict[str, dict[str, float]], wrong: dict[str, np.ndarray], figure: Any) -> None:
    left, middle, right = figure.subplots(1, 3)
    gap = [found.ratios[found.grounded == kind].mean(0) for kind in (True, False)]
    change = (gap[0] - gap[1]).numpy()
    limit = np.abs(change).max()
    picture = left.imshow(change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    left.set(xlabel="head", ylabel="layer", title="Lookback ratio,\ngrounded less hallucinated")
    left.set_xticks(range(change.shape[1]))
    left.set_yticks(range(change.shape[0]))
    figure.colorbar(picture, ax=left, orientation="horizontal")
    for i, kind in enumerate(("hidden states", "lookback ratios", "lens of the other task")):
        middle.bar(np.arange(2) + 0.27 * (i - 1), [a[kind] for a in auroc.values()], 0.25, label=kind)
    middle.set_xticks(range(2), list(auroc))
    middle.set(ylim=(0.5, 1.3), yticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0], title="AUROC on answers not seen")
    middle.legend(frameon=False, fontsize=7, loc="upper left")
    names = [
        name.replace(" by the lens of ", ",\nlens of\n").replace(" by lenses of ", ",\nlenses of\n") for name in wrong
    ]
    errors = [share.std(ddof=1) / len(share) ** 0.5 for share in wrong.values()]
    right.bar(names, [share.mean() for share in wrong.values()], yerr=errors, color="grey")
    right.tick_params(axis="x", labelsize=7)
    right.set(title="Hallucinated answers,\nshare (± 1 s.e.)")
