"""The evaluation report of checkpoints: its numbers against scikit-learn, its sentences, and the recipe on two models."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import stats
from sklearn import metrics as sklearn_metrics

from hf_sam.evaluation.classification import CLASSIFICATION
from hf_sam.evaluation.corruptions import IMAGE_CORRUPTIONS, TEXT_CORRUPTIONS
from hf_sam.evaluation.predictions import LanguagePredictions, Predictions
from hf_sam.reporting.checkpoints import Evaluated, compare_checkpoints, make_checkpoint_document, metric_estimates
from hf_sam.reporting.document import write_document
from hf_sam.reporting.evaluated import verdict
from hf_sam.tasks import image_classification, report
from hf_sam.tasks.command_line.errors import UserError

ROOT = Path(__file__).parents[2]

NAMES = ["cat", "dog", "<b>owl</b>"]


def predictions(seed, accuracy, n=300, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.random.default_rng(0).integers(classes, size=n)
    predicted = np.where(rng.random(n) < accuracy, labels, (labels + 1) % classes)
    top = rng.uniform(0.4, 0.99, size=n)
    probabilities = np.repeat(((1 - top) / (classes - 1))[:, None], classes, axis=1)
    probabilities[np.arange(n), predicted] = top
    return Predictions(labels, probabilities)


def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_scikit_learns(seed):
    kept = predictions(seed, 0.7)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(kept.labels, kept.predicted),
        "f1_macro": sklearn_metrics.f1_score(kept.labels, kept.predicted, average="macro"),
        "mcc": sklearn_metrics.matthews_corrcoef(kept.labels, kept.predicted),
        "nll": sklearn_metrics.log_loss(kept.labels, kept.probabilities),
        "brier": 2 * ((kept.probabilities - np.eye(3)[kept.labels]) ** 2).mean() * 3 / 2,
    }
    for name, value in expected.items():
        assert CLASSIFICATION[name](kept) == pytest.approx(value), name


def test_metrics_where_a_class_is_missing_or_only_one_is_predicted():
    kept = Predictions(np.array([0, 0, 1]), np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.7, 0.3, 0]]))
    assert CLASSIFICATION["f1_macro"](kept) == pytest.approx(
        sklearn_metrics.f1_score(kept.labels, kept.predicted, average="macro", zero_division=0)
    )
    assert CLASSIFICATION["mcc"](kept) == 0.0


def test_pairs_are_tested_by_mcnemar_and_adjusted():
    models = [Evaluated(name, name, predictions(seed, share)) for seed, (name, share) in enumerate(
        {"a": 0.6, "b": 0.62, "c": 0.9}.items()
    )]  # fmt: skip
    pairs = compare_checkpoints(models, generator())
    assert [(pair["first"], pair["second"]) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    a, c = models[0].predictions.correct, models[2].predictions.correct
    only_a, only_c = int((a & ~c).sum()), int((c & ~a).sum())
    assert pairs[1]["p"] == pytest.approx(stats.binomtest(only_a, only_a + only_c).pvalue)
    assert pairs[1]["value"] == pytest.approx(c.mean() - a.mean())
    assert pairs[1]["p_holm"] <= 3 * pairs[1]["p"]
    assert pairs[1]["low"] > 0


def test_the_verdict_tells_absence_of_evidence_from_evidence_of_absence():
    accuracy = {"metric": "accuracy", "value": 0.001}
    assert verdict({**accuracy, "p_holm": 0.01, "p_equivalent": 0.01}) == "better"
    assert verdict({**accuracy, "p_holm": 0.5, "p_equivalent": 0.01}) == "equivalent"
    assert verdict({**accuracy, "p_holm": 0.5, "p_equivalent": 0.5}) == "undecided"
    assert verdict({"metric": "loss", "value": 0.1, "p_holm": 0.01, "p_equivalent": None}) == "worse"
    right, n = predictions(1, 0.9, n=40_000), 40_000
    other = Predictions(right.labels, right.probabilities[:, [0, 1, 2]].copy())
    other.probabilities[:20] = np.roll(other.probabilities[:20], 1, axis=1)
    (pair,) = compare_checkpoints([Evaluated("a", "a", right), Evaluated("b", "b", other)], generator())
    gain = other.correct.astype(float) - right.correct
    oracle = max(
        stats.ttest_1samp(gain, -0.003, alternative="greater").pvalue,
        stats.ttest_1samp(gain, 0.003, alternative="less").pvalue,
    )
    assert len(gain) == n
    assert pair["p_equivalent"] == pytest.approx(oracle, rel=1e-6, abs=1e-300)


def test_too_few_test_examples_are_told(tmp_path):
    models = [Evaluated("a", "a", predictions(1, 0.8)), Evaluated("b", "b", predictions(2, 0.8))]
    document = make_checkpoint_document(models, {}, ["x"] * 300, NAMES)
    assert document.warnings[0].startswith(
        "Too few test examples to detect one point between a and b: 300 here, about "
    )


def test_one_test_example_has_values_without_intervals(tmp_path):
    models = [Evaluated(name, name, predictions(seed, 1.0, n=1)) for seed, name in enumerate("ab")]
    for entry in models:
        entry.corrupted = {("noise", 1): entry.predictions}
    write_document(make_checkpoint_document(models, {}, ["x"], NAMES), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| noise | 1 | 100.0 | 100.0 |" in markdown


def test_the_report_says_what_was_found_and_escapes_it(tmp_path):
    models = [
        Evaluated("base", "a", predictions(1, 0.6), seconds=2.0),
        Evaluated("sam", "b", predictions(2, 0.9), seconds=1.0),
    ]
    for entry, shares in zip(models, ((0.5, 0.4, 0.3), (0.8, 0.6, 0.5)), strict=True):
        entry.corrupted = {
            ("noise", level): predictions(level, share, n=100) for level, share in zip((1, 2, 3), shares, strict=True)
        }
    examples = [f"<i>text {index}</i>" for index in range(300)]
    document = make_checkpoint_document(models, {"data": "<script>"}, examples, NAMES)
    html = write_document(document, tmp_path).read_text()
    assert "<script>" not in html
    assert "&lt;b&gt;owl&lt;/b&gt;" in html
    assert "&lt;i&gt;text" in html
    markdown = (tmp_path / "report.md").read_text()
    gain = models[1].predictions.correct.mean() - models[0].predictions.correct.mean()
    assert f"> **sam is better than base on this test split: accuracy {100 * gain:+.1f} \\[" in markdown
    assert "(exact McNemar p &lt; 0.0001).**" in markdown
    nll = CLASSIFICATION["nll"](models[1].predictions) - CLASSIFICATION["nll"](models[0].predictions)
    assert f"| sam | NLL | {nll:+.3f} \\[" in markdown  # beside accuracy, on the first screen
    differ = int((models[0].predictions.predicted != models[1].predictions.predicted).sum())
    assert f"differ on {differ} of 300 examples" in markdown
    assert "each checkpoint is one run" in markdown
    robust = pd.read_csv(tmp_path / "data" / "robustness.csv")
    assert len(robust) == 6
    assert pd.read_csv(tmp_path / "data" / "confusion.csv").shape == (6, 5)


def test_level_zero_is_about_the_examples_that_are_corrupted(tmp_path):
    kept = predictions(1, 0.6)
    entry = Evaluated("base", "a", kept, corrupted={("noise", 1): predictions(2, 0.4, n=40)})
    entry.corrupted_rows = np.flatnonzero(~kept.correct)[:40]  # those that it has wrong
    write_document(make_checkpoint_document([entry], {}, ["x"] * 300, NAMES), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| none | 0 | 0.0 |" in markdown
    assert "on the same 40 examples" in markdown


@pytest.mark.slow
def test_checkpoints_of_different_data_are_told_apart(tmp_path):
    models = [Evaluated(name, name, predictions(1, 0.6)) for name in ("a", "b", "hub")]
    for entry, count in zip(models, (600, 60), strict=False):
        entry.data = {"train": {"examples": count, "fingerprint": f"train-{count}"}}
    write_document(make_checkpoint_document(models, {}, ["x"] * 300, NAMES), tmp_path / "other")
    markdown = (tmp_path / "other/report.md").read_text()
    assert "| a | a | None | 600 | train-600 | - |" in markdown
    assert "trained on different data (a on 600, b on 60, hub on - examples)" in markdown
    models[1].data = models[0].data
    write_document(make_checkpoint_document(models, {}, ["x"] * 300, NAMES), tmp_path / "same")
    assert "different data" not in (tmp_path / "same/report.md").read_text()


def test_disagreements_on_images_are_shown_as_images(tmp_path):
    models = [Evaluated("a", "a", predictions(1, 0.6)), Evaluated("b", "b", predictions(2, 0.7))]
    asked = []

    def image_of(index):
        asked.append(index)
        return Image.new("RGB", (8, 8))

    document = make_checkpoint_document(models, {}, [f"image {i}" for i in range(300)], NAMES, image_of=image_of)
    write_document(document, tmp_path)
    shown = pd.read_csv(tmp_path / "data/disagreements.csv")
    assert list(shown["index"]) == asked
    assert len(asked) == 20
    assert (tmp_path / "figures/disagreements.svg").read_text().count("<image") == 20


def test_language_models_are_compared_by_loss_per_token(tmp_path):
    rng = generator()
    tokens = rng.integers(5, 30, size=80)
    nll = tokens * rng.uniform(2, 4, size=80)
    models = [
        Evaluated("a", "a", LanguagePredictions(nll, tokens)),
        Evaluated("b", "b", LanguagePredictions(nll * 0.9, tokens)),
    ]
    estimates = metric_estimates(models, generator())
    assert estimates["a"]["perplexity"].value == pytest.approx(np.exp(nll.sum() / tokens.sum()))
    assert estimates["a"]["perplexity"].low < estimates["a"]["perplexity"].value
    write_document(make_checkpoint_document(models, {}, ["text"] * 80), tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "b is better than a on this test split: loss -0.3" in markdown
    assert "Per class" not in markdown


def test_a_text_of_one_token_is_no_evidence():
    """It has no loss per token; as 0 / 0, it once made any two models differ significantly."""
    tokens = np.array([8] * 19 + [1, 0])
    losses = np.random.default_rng(0).uniform(1, 2, len(tokens)) * tokens
    same = [Evaluated(name, name, LanguagePredictions(losses, tokens)) for name in ("a", "b")]
    (pair,) = compare_checkpoints(same, generator())
    assert pair["p"] == 1.0
    assert verdict(pair) == "undecided"


def test_classes_may_have_any_name(tmp_path):
    names = ["true", "checkpoint", "index"]
    checkpoints = [Evaluated(name, name, predictions(seed, 0.7)) for seed, name in enumerate(("index", "true class"))]
    write_document(make_checkpoint_document(checkpoints, {}, ["text"] * 300, names), tmp_path)
    counts = pd.read_csv(tmp_path / "data" / "confusion.csv", header=0)
    assert counts.iloc[:, :3].to_numpy().sum() == 600


def test_one_checkpoint_is_reported_alone(tmp_path):
    write_document(
        make_checkpoint_document([Evaluated("a", "a", predictions(1, 0.6))], {}, ["x"] * 300, NAMES), tmp_path
    )
    assert "there is no comparison" in (tmp_path / "report.md").read_text()


# --- corruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IMAGE_CORRUPTIONS)
def test_image_corruptions_grow_with_their_level_and_repeat(kind):
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1)))
    image = Image.fromarray(pixels.astype("uint8"))
    corrupted = [IMAGE_CORRUPTIONS[kind](image, level, np.random.default_rng(0)) for level in (1, 2, 3)]
    distance = [np.abs(np.asarray(result, float) - pixels).mean() for result in corrupted]
    assert 0 < distance[0] < distance[1] < distance[2]
    assert all(result.size == image.size and result.mode == "RGB" for result in corrupted)
    assert corrupted[1] == IMAGE_CORRUPTIONS[kind](image, 2, np.random.default_rng(0))


def test_character_noise_touches_letters_only_and_as_many_as_it_says():
    text = "the 12 quick brown foxes, 34. " * 200
    letters = sum(character.isalpha() for character in text)
    for level, rate in ((1, 0.03), (2, 0.06), (3, 0.12)):
        changed = TEXT_CORRUPTIONS["characters"](text, level, np.random.default_rng(0))
        kept = lambda string: [character for character in string if not character.isalpha()]  # noqa: E731
        assert sorted(kept(changed)) == sorted(kept(text))
        dropped_minus_doubled = abs(len(changed) - len(text))
        assert dropped_minus_doubled < rate * letters
        assert changed != text


# --- the recipe ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = []
    for rho in ("0", "0.05"):
        folder = tmp_path_factory.mktemp("checkpoints") / f"rho{rho}"
        config = ROOT / "configs/image_classification/digits.yaml"
        image_classification.main(
            f"{config} --max_steps=2 --train_samples=64 --test_samples=60 --use_cpu=true --disable_tqdm=true "
            f"--sam_rho={rho} --output_dir={folder}".split()
        )
        folders.append(folder)
    return folders


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_only_one_class_per_example_is_supported(kind):
    with pytest.raises(UserError, match=f"supports classifiers with one class per example, .* not problem_type={kind}"):
        report.check_one_class([["text"], "label", kind, ["a"]], "report")
    report.check_one_class([["text"], "regression", "single_label_classification", ["a"]], "report")
    report.check_one_class(["image", "regression", ["a"]], "report")


def test_one_command_reports_on_two_checkpoints(checkpoints, tmp_path, capsys):
    first, second = checkpoints
    path = report.main(
        f"{first} sam={second} --corruption_samples 10 --disable_tqdm true --output_dir {tmp_path} "
        "--sharpness true --measures sam average --rho 0.01 0.05 --draws 1 --num_examples 32".split()
    )
    assert str(path) in capsys.readouterr().out
    markdown = path.with_name("report.md").read_text()
    assert "on 60 test examples" in markdown  # the data of the first one's run record
    assert re.search(r"> \*\*.*sam.*rho0.*: accuracy [+-]", markdown)
    assert "recipes/report.py" in markdown or "hf-sam report" in markdown
    assert "SAM sharpness, rho = 0.05" in markdown
    assert "| ViTForImageClassification | 64 |" in markdown  # trained on
    assert "different data" not in markdown
    assert "on the same 10 examples" in markdown
    differ = re.search(r"differ on (\d+) of 60 examples", markdown)
    assert (tmp_path / "figures" / "disagreements.svg").exists() == (int(differ[1]) > 0)
    assert (tmp_path / "figures" / "sharpness-rho.svg").exists()
    metrics = pd.read_csv(tmp_path / "data" / "metrics.csv").set_index(["checkpoint", "metric"])
    for name, folder in (("rho0", first), ("sam", second)):
        told = pd.read_json(folder / "all_results.json", typ="series")
        for metric in ("accuracy", "f1_macro", "mcc", "nll", "ece", "brier"):  # the recipe's own numbers
            assert metrics.loc[(name, metric), "value"] == pytest.approx(told[f"test_{metric}"], abs=2e-6), metric


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Give at least one checkpoint"),
        (["nowhere"], "nowhere cannot be read"),
        (["{first}", "nowhere"], "nowhere cannot be read"),
        (["{first}", "--split", "dev"], "split=dev does not exist. Allowed: train, test"),
        (["{first}", "--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["{first}", "{first}"], "Two checkpoints have the same name"),
        (["{first}", "--sam_rho", "1"], "is not an argument of this recipe"),
    ],
)
def test_mistakes_end_in_one_line(checkpoints, tmp_path, argv, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word.format(first=checkpoints[0]) for word in argv]
    with pytest.raises(UserError, match=message):
        report.main([*words, *(["--output_dir", str(tmp_path), "--corruption_samples", "0"] if words else [])])
