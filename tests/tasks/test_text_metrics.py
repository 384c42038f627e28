"""Metrics of texts and tags against the formula written out, or values worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from transformers import EvalPrediction

from hf_sam.tasks import text_metrics


def test_bleu_of_one_sentence_worked_out():
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples are in the reference; as long as it."""
    found = text_metrics.bleu(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_chrf_is_the_f2_of_character_n_grams_of_up_to_six():
    text, reference = "a dull long film", "the dull short film"
    precision, recall = [], []
    for n in range(1, 7):
        a, b = (
            Counter(s[i : i + n] for i in range(len(s) - n + 1))
            for s in (x.replace(" ", "") for x in (text, reference))
        )
        common = sum((a & b).values())
        precision.append(common / sum(a.values()))
        recall.append(common / sum(b.values()))
    p, r = np.mean(precision), np.mean(recall)
    assert text_metrics.chrf([text], [reference])["chrf"] == pytest.approx(100 * 5 * p * r / (4 * p + r))


def test_rouge_is_averaged_over_texts():
    found = text_metrics.rouge(["a cat sat", "dogs ran"], ["a cat ran here", "dogs ran"])
    assert found["rouge1"] == pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4) + 1) / 2)
    assert found["rouge2"] == pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3) + 1) / 2)
    assert found["rougeL"] == found["rouge1"], "the common words come in the same order"


def test_exact_match_leaves_out_spaces_at_the_ends_alone():
    found = text_metrics.exact_match(["yes ", "Yes", "no"], ["yes", "yes", "no"])
    assert found["exact_match"] == pytest.approx(2 / 3)


def test_entities_count_whole():
    """Of (PER 0-1, LOC 3) the second is found; the first is cut short, which is one wrong and one missed."""
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O"]]
    said = [["B-PER", "O", "O", "B-LOC"], ["B-LOC"]]
    found = text_metrics.entities(said, true)
    assert found["entity_precision"] == pytest.approx(1 / 3)
    assert found["entity_recall"] == pytest.approx(1 / 2)
    assert found["entity_f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))


def test_a_model_that_finds_no_entity_has_zeros_and_no_warning():
    found = text_metrics.entities([["O", "O"]], [["B-PER", "O"]])
    assert found == {"entity_precision": 0.0, "entity_recall": 0.0, "entity_f1": 0.0}


def test_what_is_no_word_does_not_count():
    logits = np.zeros((2, 3, 2))
    logits[..., 1] = 1.0  # always B-X
    labels = np.array([[-100, 1, 0], [1, -100, -100]])
    logits[0, 0], logits[1, 1:] = 100.0, -100.0  # special tokens and padding
    found = text_metrics.tag_metrics(EvalPrediction(predictions=logits, label_ids=labels), names=["O", "B-X"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["entity_precision"] == pytest.approx(2 / 3)
    assert found["entity_recall"] == 1.0
    table = text_metrics.tag_table(logits, labels)
    assert [list(row) for row in table["label"]] == [[1, 0], [1]]
    assert [list(row) for row in table["prediction"]] == [[1, 1], [1]]
    assert list(table["answers"]) == [2, 1]
    assert list(table["correct"]) == [1, 1]
    assert sum(table["nll"]) / 3 == pytest.approx(found["nll"])


def test_an_answer_that_names_no_class_is_wrong_and_no_class_of_its_own():
    chosen, true = np.array([0, 1, -1, 1]), np.array([0, 1, 1, 0])
    found = text_metrics.class_metrics(chosen, true)
    assert found["accuracy"] == 0.5
    assert found["no_class"] == 0.25
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)  # 2 TP / (2 TP + FP + FN) of either class


def test_an_answer_that_is_no_number_counts_as_minus_one():
    found = text_metrics.number_metrics(text_metrics.numbers_in(["3.0", "many", "inf"]), np.array([3.0, 1.0, 1.0]))
    assert found["mse"] == pytest.approx((0 + 4 + 4) / 3)
    assert found["no_number"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["O", "B-X", "I-X"], True), (["O", "I-X"], True), (["NN", "VB"], False), (["O", "X"], False), (["B-X"], False)],
)
def test_tags_that_mark_entities(names, expected):
    assert text_metrics.are_entity_tags(names) is expected
