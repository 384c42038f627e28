"""Metrics of generated texts and of tagged words; no network needed."""

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

logging.getLogger("absl").setLevel(logging.WARNING)  # rouge-score logs its tokenizer for every scorer
_LIKELIHOOD = ("perplexity", "nll_per_token", "loss")
# Metrics of each kind of answer, besides the loss; a comparison uses one of them.
ANSWERS = ("accuracy", "f1_macro", "mcc", "no_class", *_LIKELIHOOD)
NUMBERS = ("pearson", "spearman", "mse", "no_number", *_LIKELIHOOD)
SUMMARIES = ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", *_LIKELIHOOD)
TRANSLATIONS = ("bleu", "chrf", "exact_match", *_LIKELIHOOD)
TEXTS = tuple(dict.fromkeys(("exact_match", *SUMMARIES, *TRANSLATIONS)))
TAGS = ("accuracy", "f1_macro", "mcc", "nll", "ece", "brier", "loss")
ENTITIES = ("entity_f1", "entity_precision", "entity_recall")


def exact_match(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Compute the share of texts equal to their targets, ignoring leading and trailing spaces."""
    return {"exact_match": float(np.mean([a.strip() == b.strip() for a, b in zip(texts, targets, strict=True)]))}


def rouge(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Compute ROUGE-1, -2, -L and -Lsum F-measures (lines are sentences; Porter stemmer), averaged over texts."""
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(target, text) for text, target in zip(texts, targets, strict=True)]
    return {kind: float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def bleu(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Compute corpus BLEU with sacrebleu's defaults (13a, exponential smoothing), 0 to 100."""
    return {"bleu": float(sacrebleu.corpus_bleu(list(texts), [list(targets)]).score)}


def chrf(texts: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Compute corpus chrF2 with sacrebleu's defaults, 0 to 100."""
    return {"chrf": float(sacrebleu.corpus_chrf(list(texts), [list(targets)]).score)}


def entities(chosen: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """Compute precision, recall and F1 of whole entities from B-, I- and O tags, as conlleval does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # early in training no entity may be predicted: 0 / 0 counts as 0
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
    """Decode padded tokens, `(n, length)`; -100 also counts as padding."""
    return [
        text.strip()
        for text in tokenizer.batch_decode(
            np.where(tokens == -100, tokenizer.pad_token_id, tokens), skip_special_tokens=True
        )
    ]


def class_answers(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """
    Return each class word as it is decoded from a correct answer of the model.

    Raises:
        UserError: If two words decode to the same text, or one to an empty text.
    """
    texts = decoded(padded(tokenizer(text_target=list(words))["input_ids"]), tokenizer)
    for index, text in enumerate(texts):
        if not text or text in texts[:index]:
            other = f", as {words[texts.index(text)]!r} does" if text else ""
            raise UserError(
                f"The word {words[index]!r} decodes to {text!r}{other}, so an answer does not identify the class; give other "
                "words with --label_words."
            )
    return texts


def chosen_classes(texts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Return the class that each text names, or -1 if it names none, `(n,)`."""
    number = {text: index for index, text in enumerate(answers)}
    return np.array([number.get(text, -1) for text in texts], dtype=int)


def numbers_in(texts: Sequence[str]) -> np.ndarray:
    """Parse each text as a finite number, NaN if it is not one, `(n,)`."""
    return np.array([_number(text) for text in texts], dtype=float)


def generation_metrics(
    prediction: EvalPrediction,
    problem_type: str,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str] | None = None,
    hub: Sequence[Any] = (),
) -> dict[str, float]:
    """
    Compute all metrics of one kind of answer.

    Args:
        prediction (`EvalPrediction`): Predictions of `GenerationWithLikelihood`, and labels `(n, tokens)`.
        problem_type (`str`): `"classification"`, `"regression"`, or a key of `OF_TEXTS`.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer that decodes tokens.
        answers (`Sequence[str]`, *optional*): The text for each class, see `class_answers`.
        hub (`Sequence`, *optional*): Metrics from the hub to add.
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
    """Compute accuracy, MCC, and macro F1 over true or predicted classes; an answer without a class (-1) is wrong."""
    classes = np.unique(np.concatenate([true, chosen[chosen >= 0]]))
    return {
        "accuracy": float((chosen == true).mean()),
        "f1_macro": float(sklearn_metrics.f1_score(true, chosen, labels=classes, average="macro", zero_division=0)),
        "mcc": float(sklearn_metrics.matthews_corrcoef(true, chosen)),
        "no_class": float((chosen < 0).mean()),
    } | of_hub(hub, chosen, true)


def number_metrics(values: np.ndarray, true: np.ndarray, hub: Sequence[Any] = ()) -> dict:
    """Compute correlations and squared error; an answer that is not a number counts as -1, as in T5's evaluation."""
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
    Return the columns of saved predictions: target and generated text, and the target's summed negative log-likelihood
    and number of tokens. For classes, also the columns that `rho_search.scores.example_scores` reads.
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
        return float(text) if np.isfinite(float(text)) else float("nan")
    except ValueError:
        return float("nan")


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Pad rows of tokens with -100 to an array `(n, longest)`."""
    longest = max(map(len, rows))
    return np.array([[*row, *[-100] * (longest - len(row))] for row in rows])


def _is_most_frequent(classes: np.ndarray) -> np.ndarray:
    return classes == np.bincount(classes[classes >= 0]).argmax() if (classes >= 0).any() else classes < -1


# --- tagged words ------------------------------------------------------------------------------------------------------


def are_entity_tags(names: Sequence[str]) -> bool:
    """Whether the tags mark entities: O and B-... or I-... only."""
    return "O" in names and all(name == "O" or name[:2] in ("B-", "I-") for name in names)


def tag_metrics(prediction: EvalPrediction, names: Sequence[str], hub: Sequence[Any] = ()) -> dict[str, float]:
    """
    Compute classification metrics over all words, and precision, recall and F1 of entities if the tags mark entities.

    Args:
        prediction (`EvalPrediction`): Logits `(n, tokens, tags)`, labels `(n, tokens)`: one label per word, -100 elsewhere.
        names (`Sequence[str]`): Names of the tags.
        hub (`Sequence`, *optional*): Metrics from the hub to add; they receive one list of tags per sentence.
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
    Return the columns of saved predictions, one row per sentence: true and predicted tags of its words, their summed
    negative log-likelihood, their number, and the number of correct ones.
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
