"""Explanations of a one-layer classifier, in closed form."""

from regard.studies.attention_vs_posthoc import Classifier, attention_vs_posthoc, gradient

from .. import Case, Source

SOURCE = Source("authors", "gianluigilopardo/attention_meets_xai")


def compare(case: Case):
    classifier = Classifier(*(case[name] for name in ("query", "key", "value", "output")))
    embeddings, masked = case["embeddings"], case["embeddings_masked"]
    found = attention_vs_posthoc(classifier, embeddings, masked)._asdict()
    words = {"lime" if name == "lime_approx" else name: case[name] for name in case.arrays if name in NAMES}
    return {
        "output": case["output"],  # which is given
        "score": classifier(embeddings),
        "attention": classifier.weights(embeddings),
        "attention_mean": found["attention_mean"],
        "attention_max": found["attention_max"],
        "gradient_theory": (gradient(classifier, embeddings), case["gradient_theory"].mean(0)),
        **{name: (found[name][1:], words[name]) for name in words},
    }


NAMES = ("gradient_mean", "gradient_l1", "gradient_l2", "gradient_input", "lime_approx")
