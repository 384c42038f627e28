"""Metrics of generated texts and of tagged words; need no network."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction, PreTrainedTokenizerBase

from .command_line.errors import UserError
from .metrics import classification_metrics, of_hub, perplexity, regression_metrics

try:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    from seqeval import metrics as entity_metrics
except ImportError as error:
    raise UserError(f"{error.name} is not installed, which this recipe needs: pip install 'hf-sam[recipes]'.") from None

logging.getLogger("absl").setLevel(logging.WARNING)  # rouge-score says which tokenizer it takes, once a scorer
_LIKELIHOOD = ("perplexity", "nll_per_token", "loss")
# What is measured of each kind of answer, beside the loss; a comparison asks about one of them.
ANSWERS = ("accuracy", "f1_macro", "mcc", "no_class", *_LIKELIHOOD)
NUMBERS = ("pearson", "spearman", "mse", "no_number", *_LIKELIHOOD)
SUMMARIES = ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", *_LIKELIHOOD)
TRANSLATIONS = ("bleu", "chrf", "exact_match", *_LIKELIHOOD)
TEXTS = tuple(dict.fromkeys(("exact_match", *SUMMARIES, *TRANSLATIONS)))
TAGS = ("accuracy", "f1_macro", "mcc", "nll", "ece", "brier", "loss")
ENTITIES = ("entity_f1", "entity_precision", "entity_recall")


def exact_match(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Share of texts that are the target, spaces at the ends aside."""
    return {"exact_match": float(np.mean([a.strip() == b.strip() for a, b in zip(texts, targets, strict=True)]))}


def rouge(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, -2, -L and -Lsum (lines are sentences) with Porter's stemmer, averaged over texts."""
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(texts, targets, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def bleu(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU as sacrebleu has it by default (13a, exponential smoothing), 0 to 100."""
    return {"bleu": float(sacrebleu.corpus_bleu(list(texts), [list(targets)]).score)}


def chrf(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """chrF2 of the corpus as sacrebleu has it by default, 0 to 100."""
    return {"chrf": float(sacrebleu.corpus_chrf(list(texts), [list(targets)]).score)}


def entities(chosen: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, tags B-, I-, O as conlleval reads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no entity is predicted at first: 0 / 0 counts as 0
        return {
            "entity_precision": float(entity_metrics.precision_score(true, chosen)),
            "entity_recall": float(entity_metrics.recall_score(true, chosen)),
            "entity_f1": float(entity_metrics.f1_score(true, chosen)),
        }


OF_TEXTS: dict[str, tuple[Callable[[Sequence[str], Sequence[str]], dict[str, float]], ...]] = {
    "summarization": (rouge, exact_match),
    "translation": (bleu, chrf, exact_match),
    "text": (exact_match, rouge, bleu, chrf),
}


# --- generated texts ---------------------------------------------------------------------------------------------------


def decoded(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of padded tokens, `(n, length)`; -100 is padding as well."""
    return [
        text.strip()
        for text in tokenizer.batch_decode(
            np.where(tokens == -100, tokenizer.pad_token_id, tokens), skip_special_tokens=True
        )
    ]


def class_answers(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    What the tokenizer makes of the words that stand for the classes, as they come back from a model that is right.

    Raises:
        UserError: Two of them come back the same, or one as nothing.
    """
    texts = decoded(padded(tokenizer(text_target=list(words))["input_ids"]), tokenizer)
    for index, text in enumerate(texts):
        if not text or text in texts[:index]:
            other = f" as of {words[texts.index(text)]!r}" if text else ""
            raise UserError(
                f"The tokenizer makes {text!r} of {words[index]!r}{other}, so that an answer does not tell the class: give "
                "other words by --label_words."
            )
    return texts


def chosen_classes(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """The class that each text names, -1 where it names none, `(n,)`."""
    number = {text: index for index, text in enumerate(answers)}
    return np.array([number.get(text, -1) for text in texts], dtype=int)


def numbers_in(texts: Sequence[str]) -> np.ndarray:
    """The number that each text is, NaN where it is none, `(n,)`."""
    return np.array([_number(text) for text in texts], dtype=float)


def generation_metrics(
    prediction: EvalPrediction,
    problem_type: str,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str] | None = None,
    hub: Sequence[Any] = (),
) -> dict[str, float]:
    """
    All metrics of one kind of answer.

    Args:
        prediction (`EvalPrediction`): As `GenerationWithLikelihood` predicts, labels `(n, tokens)`.
        problem_type (`str`): classification, regression, or a key of `OF_TEXTS`.
        tokenizer (`PreTrainedTokenizerBase`): Turns tokens into texts.
        answers (`Sequence[str]`, *optional*): What names each class, see `class_answers`.
        hub (`Sequence`, *optional*): More metrics, of classes, numbers or texts.
    """
    *generated, nll, tokens = prediction.predictions
    found = perplexity(nll, tokens)
    if not generated:
        return found
    texts, targets = decoded(generated[0], tokenizer), decoded(prediction.label_ids, tokenizer)
    if problem_type == "classification":
        return class_metrics(chosen_classes(texts, answers), chosen_classes(targets, answers), hub) | found
    if problem_type == "regression":
        return number_metrics(numbers_in(texts), numbers_in(targets), hub) | found
    for metric in OF_TEXTS[problem_type]:
        found |= metric(texts, targets)
    return found | of_hub(hub, texts, targets)


def class_metrics(chosen: np.ndarray, true: np.ndarray, hub: Sequence[Any] = ()) -> dict:
    """Accuracy, F1 of each class that occurs or is named, MCC; an answer that names no class, -1, is wrong."""
    classes = np.unique(np.concatenate([true, chosen[chosen >= 0]]))
    return {
        "accuracy": float((chosen == true).mean()),
        "f1_macro": float(sklearn_metrics.f1_score(true, chosen, labels=classes, average="macro", zero_division=0)),
        "mcc": float(sklearn_metrics.matthews_corrcoef(true, chosen)),
        "no_class": float((chosen < 0).mean()),
    } | of_hub(hub, chosen, true)


def number_metrics(values: np.ndarray, true: np.ndarray, hub: Sequence[Any] = ()) -> dict:
    """Correlations and squared error; an answer that is no number counts as -1, as in T5's own evaluation."""
    is_none = np.isnan(values)
    prediction = EvalPrediction(predictions=np.where(is_none, -1.0, values), label_ids=true)
    return regression_metrics(prediction, hub) | {"no_number": float(is_none.mean())}


def generation_table(
    predictions: Any,
    labels: np.ndarray,
    problem_type: str,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """
    Columns of kept predictions: target and generated text, summed negative log-likelihood and tokens of the target; for
    classes also what a mean over examples is made of, see `rho_search.phases.example_scores`.
    """
    *generated, nll, tokens = predictions
    targets = decoded(labels, tokenizer)
    columns: dict[str, Any] = {"target": targets, "nll": nll, "tokens": tokens}
    if generated:
        columns["generated"] = decoded(generated[0], tokenizer)
        if problem_type == "classification":
            true = chosen_classes(targets, answers)
            columns["correct"] = (chosen_classes(columns["generated"], answers) == true).astype(int)
            columns |= {"answers": np.ones(len(true), dtype=int), "most_frequent": _is_most_frequent(true).astype(int)}
    return columns


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of tokens as an array `(n, longest)`, -100 behind their ends."""
    longest = max(map(len, rows))
    return np.array([[*row, *[-100] * (longest - len(row))] for row in rows])


def _is_most_frequent(classes: np.ndarray) -> np.ndarray:
    return classes == np.bincount(classes[classes >= 0]).argmax() if (classes >= 0).any() else classes < -1


# --- tagged words ------------------------------------------------------------------------------------------------------


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether tags mark entities: O and B-... or I-..., and nothing else."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def tag_metrics(prediction: EvalPrediction, names: Sequence[str], hub: Sequence[Any] = ()) -> dict[str, float]:
    """
    Classification metrics over all words, and precision, recall and F1 of entities where the tags mark such.

    Args:
        prediction (`EvalPrediction`): Logits `(n, tokens, tags)`, labels `(n, tokens)` with one label a word, else -100.
        names (`Sequence[str]`): Of the tags.
        hub (`Sequence`, *optional*): More metrics, of lists of tags by sentence.
    """
    logits, labels = prediction.predictions, prediction.label_ids
    is_word = labels != -100
    found = classification_metrics(EvalPrediction(predictions=logits[is_word], label_ids=labels[is_word]))
    chosen = logits.argmax(axis=-1)
    rows = [
        [[names[tag] for tag in row[words]] for row, words in zip(tags, is_word, strict=True)]
        for tags in (chosen, labels)
    ]
    return found | (entities(*rows) if are_entity_tags(names) else {}) | of_hub(hub, *rows)


def tag_table(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """
    Columns of kept predictions, a row a sentence: true and predicted tags of its words, their summed negative
    log-likelihood, how many there are, and how many are right.
    """
    logits = predictions.astype(np.float64)
    is_word, chosen = labels != -100, logits.argmax(axis=-1)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    true = np.take_along_axis(log_probabilities, np.where(is_word, labels, 0)[..., None], axis=-1)[..., 0]
    most_frequent = np.bincount(labels[is_word]).argmax()
    return {
        "label": [row[words] for row, words in zip(labels, is_word, strict=True)],
        "prediction": [row[words] for row, words in zip(chosen, is_word, strict=True)],
        "nll": -(true * is_word).sum(axis=1),
        "answers": is_word.sum(axis=1),
        "correct": ((chosen == labels) & is_word).sum(axis=1),
        "most_frequent": ((labels == most_frequent) & is_word).sum(axis=1),
    }
