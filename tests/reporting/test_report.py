import base64
import html
import json
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricate import fabricate, fabricate_run
from scipy.stats import ttest_rel

from hf_sam.evaluation.calibration import expected_calibration_error, reliability
from hf_sam.evaluation.predictions import read_predictions
from hf_sam.experiments.records import RECORD_NAME, RunRecord, find_records
from hf_sam.reporting.comparison import write_report
from hf_sam.reporting.document import DARK, escape_markdown, shorten_paths
from hf_sam.reporting.formatting import answer
from hf_sam.reporting.plots import COLOURS, curve_points, draw_curves, draw_scatter
from hf_sam.reporting.results import make_cells, natural, noise_level, pairing_problems
from hf_sam.reporting.statistics import detectable_effect
from hf_sam.reporting.study import make_study
from hf_sam.reporting.sufficiency import late_share, next_steps, seeds_for_one_point, warnings

HOSTILE = "<script>alert('x')</script> & $\\frac | `*_[a](javascript:1)"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A report of 60 runs with predictions: its folder, the page, the Markdown."""
    folder = tmp_path_factory.mktemp("small")
    records = fabricate(folder, arms=("adamw", "sam", "asam"), predictions=True)
    html = write_report(records, folder / "report", title="Does it help?")
    return folder / "report", Page(html.read_text()), (folder / "report" / "report.md").read_text()


OPEN = ["Answer", "All arms", "Curves", "Cost", "Calibration", "Label noise", "Sharpness", "Limits of this comparison"]
OPEN.insert(1, "What to do next")
FOLDED = ["Set-up", "Statistics", "Every run", "Provenance"]


def test_both_forms_have_every_section_and_the_same_sentences(small):
    folder, page, markdown = small
    assert [line[3:] for line in markdown.splitlines() if line.startswith("## ")] == OPEN + FOLDED
    assert re.findall(r"<h2>(.*?)</h2></summary>", (folder / "report.html").read_text()) == FOLDED
    assert page.tags.count("h2") == len(OPEN + FOLDED)
    sentences = [line for line in markdown.splitlines() if line.startswith(("> ", "- "))]
    sentences += [line for line in markdown.splitlines() if line.startswith("digits, ")]
    assert len(sentences) > 8  # the verdict, one answer per condition and budget, next steps and limits
    for sentence in sentences:
        text = re.sub(r"^[->] |\*\*|\\", "", sentence)
        assert text.replace("&lt;", "<").strip("*") in page.text


def test_the_verdict_and_its_forest_plot_come_first(small):
    _, _page, markdown = small
    before_next = markdown[: markdown.index("## What to do next")]
    assert "> **Yes: sam is better than adamw in all 4 comparisons, in accuracy by 0.9 to 2.8 points.**" in before_next
    assert before_next.count("](figures/") == 1
    assert re.search(r"\| digits \| equal steps \| [\d.]+ → [\d.]+ \| .* \| better \| [\d.]+ → [\d.]+ \|", before_next)


def test_the_answer_names_effect_and_interval_and_the_statistics_the_tests(small):
    folder, _, markdown = small
    table = pd.read_csv(folder / "data" / "comparisons.csv")
    row = table[(table.arm == "sam") & (table.condition == "noise 0.4") & (table.budget == "steps")].iloc[0]
    scores = pd.read_csv(folder / "data" / "runs.csv")
    scores = scores[(scores.condition == "noise 0.4") & (scores.budget == "steps")]
    wide = scores.pivot(index="seed", columns="arm", values="accuracy")
    assert row.difference == pytest.approx((wide.sam - wide.adamw).mean())
    sentence = next(line for line in markdown.splitlines() if line.startswith("digits, noise 0.4, equal steps: sam"))
    assert f"sam is better. The accuracy of sam is {100 * row.difference:.1f} points above adamw" in sentence
    assert f"(95 % interval {100 * row.student_low:+.1f} to {100 * row.student_high:+.1f}, 5 seeds)" in sentence
    assert "5 seeds cannot give a sign-flip p below 0.0625" in markdown
    assert row.t_p == pytest.approx(ttest_rel(wide.sam, wide.adamw).pvalue)
    assert row.t_p < row.p_holm < 0.05


def test_every_table_can_be_downloaded_from_the_page_alone(small):
    folder, page, markdown = small
    offered = [link for link in page.links if link.startswith("data:text/csv;base64,")]
    assert len(offered) == page.tags.count("table") + page.tags.count("figure") + 2  # and all runs and comparisons
    contents = {base64.b64decode(link.split(",")[1]) for link in offered}
    assert contents == {path.read_bytes() for path in (folder / "data").glob("*.csv")}
    assert all((folder / path).is_file() for path in re.findall(r"\]\(((?:data|figures)/[^)]*)\)", markdown))


def test_absolute_paths_are_shortened_wherever_they_are_shown_but_in_commands(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    for run in records:
        run.model["name"] = "/home/somebody/models/tiny"
    records[0].fail(RuntimeError("no file '/home/somebody/data/a.csv'"))
    command = f"hf-sam compare '/home/somebody/a & b.yaml' --output_dir={Path.cwd()}/out --hub_token=hf_{'x' * 20}"
    write_report(records, tmp_path / "report", command=command)
    shown = command.replace(f"hf_{'x' * 20}", "<TOKEN>")  # a secret is the one thing that is not copied
    for name in ("report.html", "report.md", "data/runs.csv"):
        text = (tmp_path / "report" / name).read_text()
        if name != "data/runs.csv":
            printed = f"<pre><code>{html.escape(shown, quote=False)}</code></pre>" if name == "report.html" else shown
            assert printed in text, name
            text = text.replace(printed, "")
        assert "/home/" not in text, name
    assert "…/models/tiny" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("/a/b/c/d", "…/c/d"),
        ("see /data/imdb.", "see …/imdb."),
        ("--dataset=/a/b/c, and 'x=/a/b/c'", "--dataset=…/b/c, and 'x=…/b/c'"),
        ("https://host/a/b/c and/or/else ../a/b/c ~/a/b/c", "https://host/a/b/c and/or/else ../a/b/c ~/a/b/c"),
        ("org/model", "org/model"),
        ("…/b/c", "…/b/c"),  # once is enough
    ],
)
def test_only_absolute_paths_are_shortened(text, short):
    assert shorten_paths(text) == short


def test_addresses_stay_whole_at_the_root_of_the_file_system(monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/")  # as in many containers
    assert shorten_paths("https://host/a and /a/b/c/d") == "https://host/a and …/c/d"


def test_many_runs_are_drawn_and_listed_in_part_and_counted_in_full(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_sam.reporting.comparison.MAX_RUNS", 20)
    monkeypatch.setattr("hf_sam.reporting.plots.MAX_DRAWN_POINTS", 5)
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=range(30))
    write_report(records, tmp_path / "report")
    markdown = (tmp_path / "report/report.md").read_text()
    assert "The first 20 of 60 runs; data/runs.csv has all" in markdown
    assert markdown.count("| finished |") == 20
    assert "At most 5 runs of an arm are drawn in a panel; the numbers include all." in markdown
    assert (
        len(pd.read_csv(tmp_path / "report/data/runs.csv")) == len(pd.read_csv(tmp_path / "report/data/cost.csv")) == 60
    )
    canvas, numbers = draw_scatter(make_cells(records), ["adamw", "sam"], "seconds", "accuracy", "seconds")
    assert [len(line.get_xdata()) for line in canvas.axes[0].lines] == [5, 5]
    assert len(numbers) == 60
    curve = pd.read_csv(tmp_path / "report/data/curve-eval_accuracy-steps.csv")
    assert (len(curve), set(curve.runs)) == (20, {30})  # one row per arm and step, whatever the number of seeds


def test_drawings_turn_light_on_a_dark_page(small):
    folder, _, _ = small
    for figure in (folder / "figures").iterdir():
        text = figure.read_text()
        assert "prefers-color-scheme: dark" in text
        inks = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", re.sub(r"<style>.*?</style>", "", text)))
        dark = {ink for ink in inks if sum(int(ink[i : i + 2], 16) for i in (1, 3, 5)) < 120}
        assert dark <= set(DARK), figure.name


def test_sharpness_is_named_in_words_and_drawn_against_the_metric(tmp_path):
    records = [
        fabricate_run(None, "digits", "clean", 0, "steps", arm, seed) for arm in ("adamw", "sam") for seed in (0, 1)
    ]
    for run in records:
        run.sharpness = {"loss": 0.5, "sam_0.05": 0.1 + 0.01 * run.seed, "somebody_s_own": 1.0}
    report = write_report(records, tmp_path)
    markdown = report.with_name("report.md").read_text()
    assert "| loss | SAM sharpness, rho = 0.05 | somebody" in markdown
    assert "Test accuracy against SAM sharpness, rho = 0.05." in markdown
    drawn = pd.read_csv(tmp_path / "data" / "sharpness.csv")
    assert sorted(drawn["sharpness.sam_0.05"]) == pytest.approx([0.1, 0.1, 0.11, 0.11])


def test_equal_scores_whose_mean_is_off_by_a_rounding_are_drawn(tmp_path):
    records = [
        fabricate_run(None, "digits", "noise 0.4", 0.4, "steps", arm, seed)
        for arm in ("adamw", "sam")
        for seed in range(3)
    ]
    for run in records:
        run.metrics["accuracy"] = 0.1
    assert np.mean([0.1] * 3) > 0.1
    write_report(records, tmp_path)
    assert len(pd.read_csv(tmp_path / "data" / "label-noise.csv")) == 2


def test_the_cosine_of_the_second_order_term_is_drawn_over_training(tmp_path):
    records = [
        fabricate_run(None, "digits", "clean", 0, "steps", arm, seed) for arm in ("adamw", "sam") for seed in (0, 1)
    ]
    for run in records:
        for entry in run.curves if run.arm == "sam" else ():
            entry["sam_second_order_cosine"] = 1 - 0.1 * run.seed
    write_report(records, tmp_path)
    drawn = pd.read_csv(tmp_path / "data" / "second-order-cosine.csv")
    assert set(drawn.arm) == {"sam"}
    assert set(drawn["mean"]) == {0.95}
    assert len(drawn) == 10


def test_the_page_needs_no_network(small):
    folder, page, _ = small
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\(|@import", (folder / "report.html").read_text())


def test_every_figure_is_valid_svg_and_has_its_numbers(small):
    folder, page, markdown = small
    figures = sorted((folder / "figures").iterdir())
    assert len(figures) == page.tags.count("figure") == markdown.count("](figures/") >= 8
    for figure in figures:
        ElementTree.parse(figure)
        assert len(pd.read_csv(folder / "data" / f"{figure.stem}.csv")) > 0
    numbers = json.loads((folder / "data" / "numbers.json").read_text())
    assert numbers["question"] == {
        "control": "adamw",
        "treatment": "sam",
        "metric": "accuracy",
        "margin": 0.3,
    }
    assert all((folder / path).is_file() for path in pd.read_csv(folder / "data" / "runs.csv").record)
    assert len(numbers["comparisons"]) == 8


def test_the_same_records_give_the_same_report(small):
    folder, _, _ = small
    records, _ = find_records(folder.parent)
    again = write_report(records, folder.parent / "again", title="Does it help?").parent
    for name in ("report.html", "report.md", "data/numbers.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_whatever_is_shown_is_escaped(tmp_path):
    records = []
    for arm in ("adamw", f"sam {HOSTILE}", "_hidden"):
        for seed in range(2):
            run = fabricate_run(None, HOSTILE, "clean", 0, "steps", arm, seed)
            run.metrics[HOSTILE] = 0.5
            run.model["name"] = HOSTILE
            records.append(run)
    broken = RunRecord(task=HOSTILE, arm="adamw", seed=9)
    broken.fail(RuntimeError(HOSTILE))
    html = write_report([*records, broken], tmp_path, title=HOSTILE, problems=[HOSTILE])
    page = Page(html.read_text())
    assert "script" not in page.tags
    assert "javascript:1" not in page.links
    assert page.text.count("<script>alert('x')</script>") > 10  # shown as text
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in markdown
    assert "[a](javascript" not in markdown
    heads = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in heads]
    for above, below, line in zip(widths, widths[1:], heads[1:], strict=False):
        assert above == below or not line.startswith("| ---"), line  # the rule under each head has as many columns


def test_markdown_escape_leaves_one_line_and_no_markup():
    assert escape_markdown("a\nb | <i> *c* `d` [e](f) \\") == "a b \\| &lt;i&gt; \\*c\\* \\`d\\` \\[e\\](f) \\\\"


@pytest.mark.slow
def test_a_thousand_records_render_in_seconds(tmp_path):
    tasks = ("digits", "sentences", "solar_cells", "reuters_r8")
    fabricate(tmp_path, tasks=tasks, conditions=("clean", *(f"noise 0.{level}" for level in (2, 4, 6, 8))), entries=3)
    start = time.process_time()
    records, _ = find_records(tmp_path)
    path = write_report(records, tmp_path / "report")
    assert len(records) == 1000
    assert time.process_time() - start < 30  # 8 s on one core
    assert path.stat().st_size < 8e6  # every figure twice: for wide and for narrow screens


def test_one_seed_says_so_and_gives_no_interval(tmp_path):
    records = fabricate(tmp_path, seeds=[3], conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    write_report(records, tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "One seed gives no interval and says nothing about other seeds." in markdown
    assert "> Warning: One seed is not a comparison: digits. At least three are needed for a verdict." in markdown
    assert "Some comparisons rest on one seed" in markdown
    assert "| one seed |" in markdown
    row = pd.read_csv(tmp_path / "report" / "data" / "comparisons.csv").iloc[0]
    assert row[["bootstrap_low", "bootstrap_high", "student_low", "sign_flip_p", "p_holm"]].isna().all()


def test_enough_seeds_can_establish_an_effect_and_its_absence(tmp_path):
    records = fabricate(tmp_path, seeds=range(8), conditions=("noise 0.4",), budgets=("steps",), arms=("adamw", "asam"))
    verdicts = {entry.arm: entry.verdict for entry in make_study(records).comparisons}
    assert verdicts == {"asam": "better"}
    for run in records:
        run.metrics = {"perplexity": run.metrics["accuracy"]}  # the same numbers, where less is better
    assert make_study(records).comparisons[0].verdict == "worse"
    for run in records:
        run.metrics = {"accuracy": 0.5 + (run.seed * 7 + len(run.arm)) % 5 / 100}
    study = make_study(records)
    assert study.comparisons[0].verdict == "undecided"
    paired, sentence = study.comparisons[0].paired, answer(study.comparisons[0])
    assert "the runs show neither a difference nor equivalence" in sentence
    assert f"95 % interval {100 * paired.t_low:+.1f} to {100 * paired.t_high:+.1f}" in sentence
    assert f"detect a difference of {100 * paired.detectable:.1f} points four times in five" in sentence
    assert f"only that the difference is within ±{100 * paired.within:.1f} points" in sentence


def equal_but_for(records, gains):
    """Gives the arm beside the control these gains over it, one per seed."""
    for run in records:
        run.metrics = {"accuracy": 0.8 + run.seed / 100 + (gains[run.seed] if run.arm == "sam" else 0)}


def test_a_difference_within_the_margin_is_evidence_of_absence(tmp_path):
    records = fabricate(tmp_path, seeds=range(6), conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    equal_but_for(records, [0.001, -0.001, 0.0005, -0.0005, 0.0008, -0.0006])
    (entry,) = make_study(records).comparisons
    assert entry.verdict == "equivalent"
    assert "equivalent. sam and adamw differ by less than ±0.3 points" in answer(entry)
    assert make_study(records, margin=0.03).comparisons[0].verdict == "undecided"
    equal_but_for(records, [0.01, -0.01, 0.005, -0.005, 0.008, -0.006])  # ten times as far apart: nothing is shown
    assert make_study(records).comparisons[0].verdict == "undecided"
    assert make_study(records, margin=2).comparisons[0].verdict == "equivalent"


def test_a_sure_gain_that_does_not_matter_is_called_both(tmp_path):
    records = fabricate(tmp_path, seeds=range(6), conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    equal_but_for(records, [0.001, 0.0012, 0.0011, 0.0009, 0.001, 0.0013])
    (entry,) = make_study(records).comparisons
    assert entry.verdict == "better"
    assert "sam is better, though by less than the margin of ±0.3 points" in answer(entry)


# --- what keeps the runs from answering ---------------------------------------------------------------------------------


def test_too_few_seeds_are_told_with_how_many_would_see_one_point(tmp_path):
    records = fabricate(tmp_path, seeds=range(3), conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    equal_but_for(records, [0.01, -0.01, 0.0])
    study = make_study(records)
    needed = seeds_for_one_point(study)
    spread = np.std([0.01, -0.01, 0.0], ddof=1)
    assert spread * detectable_effect(needed) <= 0.01 < spread * detectable_effect(needed - 1)
    (message,) = warnings(study)
    assert f"detecting one point would take about {needed} seeds" in message
    assert f"--seeds 0 1 ... {needed - 1}" in " ".join(next_steps(study))
    equal_but_for(records, [0.0001, -0.0001, 0.0])
    assert warnings(make_study(records)) == []


def test_runs_at_chance_cannot_answer(tmp_path):
    arms = ("adamw", "sam")
    records = fabricate(
        tmp_path, conditions=("clean",), budgets=("steps",), arms=arms, seeds=range(3), predictions=True
    )
    assert not any("chance" in message for message in warnings(make_study(records)))
    for run in records:
        run.predictions = None
        run.metrics["mcc"] = 0.01 if run.arm == "sam" else 0.4
    (message,) = [message for message in warnings(make_study(records)) if "chance" in message]
    assert message.startswith("No better than chance: digits (sam).")
    labels = np.arange(200) % 4
    for run in records:
        run.predictions, run.metrics = "predictions.parquet", {"accuracy": 0.25}
        table = pd.DataFrame({"label": labels, "probabilities": [[0.4, 0.2, 0.2, 0.2]] * 200})
        table.to_parquet(run.path.parent / run.predictions)
    assert "No better than chance: digits (adamw, sam)." in " ".join(warnings(make_study(records)))


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ([5, 4, 3, 2, 1, 0], 0.2),  # a straight line: a fifth in the last fifth
        ([5, 1, 0.5, 0.2, 0.1, 0.1], 0),
        ([1, 2, 3, 4, 5, 6], None),  # nothing learnt
        ([3, 2, 1], None),  # too few points to say
    ],
)
def test_the_share_that_was_learnt_late(losses, share):
    run = RunRecord("t", "a", curves=[{"step": 10 * step, "loss": loss} for step, loss in enumerate(losses)])
    assert late_share(run, "accuracy") == (None if share is None else pytest.approx(share, abs=1e-9))


def test_runs_that_still_improve_are_named(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=range(3))
    assert not any("Still improving" in message for message in warnings(make_study(records)))
    for run in records:
        if run.arm == "sam":
            run.curves = [{"step": step, "eval_accuracy": 0.1 + step / 200} for step in range(0, 101, 10)]
    assert any(
        message.startswith("Still improving at the end of training: digits (sam)")
        for message in warnings(make_study(records))
    )


def test_three_seeds_can_establish_a_large_effect_and_lean_towards_a_lesser_one(tmp_path):
    records = fabricate(tmp_path, seeds=range(3), budgets=("steps",), arms=("adamw", "sam"))
    gains = {"noise 0.4": (0.10, 0.11, 0.12), "clean": (0.10, 0.15, 0.20)}
    for run in records:
        run.metrics = {"accuracy": 0.5 + (gains[run.condition][run.seed] if run.arm == "sam" else 0)}
    verdicts = {entry.cell.condition: entry.verdict for entry in make_study(records).comparisons}
    assert verdicts["noise 0.4"] == "better"
    assert verdicts["clean"] == "better"  # p 0.035, and 0.035 again as Holm's second
    for run in records:
        if run.condition == "noise 0.4":
            run.metrics = {"accuracy": 0.5 + 0.01 * ((run.seed + (run.arm == "sam")) % 3)}
    verdicts = {entry.cell.condition: entry.verdict for entry in make_study(records).comparisons}
    assert verdicts == {"noise 0.4": "undecided", "clean": "leans better"}


def test_what_the_other_arms_keep_of_the_gain(tmp_path):
    arms = ("adamw", "sam", "looksam")
    records = fabricate(tmp_path, seeds=range(8), conditions=("noise 0.4",), budgets=("steps",), arms=arms)
    for run in records:
        gain = {"adamw": 0, "sam": 0.08 + run.seed / 1000, "looksam": 0.06 + run.seed / 500}[run.arm]
        run.metrics = {"accuracy": 0.5 + run.seed / 100 + gain}
    write_report(records, tmp_path / "report", treatment="sam")
    text = (tmp_path / "report" / "report.md").read_text()
    low, high = 0.067 / 0.0835 - 0.04, 0.067 / 0.0835 + 0.04  # the mean gains, and the interval around their ratio
    kept = re.search(r"\| looksam \| (\d+) % \\\[(\d+) %, (\d+) %\\\] \| 1.20 \|", text)
    assert int(kept[1]) == 80
    assert 100 * low < int(kept[2]) < 80 < int(kept[3]) < 100 * high
    for run in records:
        run.metrics = {"accuracy": 0.5 + (run.seed * 7 + len(run.arm)) % 5 / 100}
    write_report(records, tmp_path / "nothing", treatment="sam")
    assert "share kept" not in (tmp_path / "nothing" / "report.md").read_text()


def test_failed_unfinished_and_diverged_runs_count_nowhere_and_are_named(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    records[0].fail(RuntimeError("CUDA out of memory"))
    records[1].status = "running"
    records[2].metrics = {"accuracy": None}
    study = make_study(records, missing=4)
    assert study.comparisons[0].paired.seeds == (3, 4)
    write_report(records, tmp_path / "report", missing=4)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "1 run failed" in markdown
    assert "RuntimeError: CUDA out of memory" in markdown
    assert "1 run unfinished and 4 not started" in markdown
    assert "1 finished run without a finite accuracy" in markdown


def test_the_legend_leaves_out_an_arm_whose_runs_all_failed_and_keeps_the_colours(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "broken", "sam"))
    for run in records:
        if run.arm == "broken":
            run.fail(RuntimeError("no"))
            run.metrics, run.curves = {}, []
    study = make_study(records, treatment="sam")
    points = curve_points(study.cells, study.arms, "loss")
    for canvas, _ in (
        draw_scatter(study.cells, study.arms, "accuracy", "accuracy", "accuracy"),
        draw_curves(study.cells, study.arms, points, "step", "loss"),
    ):
        assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["adamw", "sam"]
        colours = [line.get_color() for line in canvas.legends[0].get_lines()]
        assert colours == [COLOURS[study.arms.index(arm)] for arm in ("adamw", "sam")]


def test_only_failed_runs_still_give_a_report(tmp_path):
    run = RunRecord(task="t", arm="sam", seed=0)
    run.fail(ValueError("no"))
    write_report([run], tmp_path)
    assert "No answer yet" in (tmp_path / "report.md").read_text()


def test_no_records_is_a_message():
    with pytest.raises(ValueError, match=r"no run record to report on\. a\.json: broken"):
        make_study([], problems=["a.json: broken"])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"control": "adam"}, "control='adam' is not an arm of these records, which have: adamw, sam"),
        ({"treatment": "samm"}, "treatment='samm'"),
        ({"metric": "acc"}, "metric='acc' is not in any record. Allowed: accuracy, nll"),
    ],
)
def test_a_question_about_what_is_not_there_is_a_message(tmp_path, question, message):
    records = fabricate(tmp_path, conditions=("clean",), arms=("adamw", "sam"), seeds=[0])
    with pytest.raises(ValueError, match=message):
        make_study(records, **question)


def test_a_run_that_costs_the_same_under_both_budgets_counts_under_both(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("sam",), seeds=[0])
    records[0].budget = "steps+passes"
    assert [cell.budget for cell in make_cells(records)] == ["steps", "passes"]


def test_broken_pairs_are_found(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=[0, 1])
    assert pairing_problems(records) == []
    records[0].model["fingerprint"] = "another head"
    records[3].data["train"]["fingerprint"] = "other noise"
    assert pairing_problems(records) == [
        "digits, clean, seed 0: the arms did not have the same initial weights.",
        "digits, clean, seed 1: the arms did not have the same training data.",
    ]


@pytest.mark.parametrize(
    ("second", "is_said"), [("2026-01-01T10:00:30+00:00", True), ("2026-01-01T10:01:05+00:00", False)]
)
def test_trials_that_ran_at_the_same_time_are_named(tmp_path, second, is_said):
    """The first one ran from 10:00:00 to 10:01:00; the search of the other arm was one after the other."""
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    for arm, starts in {
        "adamw": ["2026-01-01T10:00:00+00:00", "2026-01-01T10:01:00+00:00"],
        "sam": ["2026-01-01T10:00:00+00:00", second],
    }.items():
        for number, start in enumerate(starts):
            names = {"task": "digits", "arm": arm, "budget": "tuning steps", "status": "finished"}
            path = tmp_path / arm / f"trial-{number:03d}" / RECORD_NAME
            end = start.replace(":00+", ":59+").replace("10:00:59", "10:01:00")
            records.append(RunRecord(**names, metrics={"accuracy": 1.0}, started=start, ended=end, path=path))
    text = write_report(records, tmp_path / "report", control="adamw").with_name("report.md").read_text()
    assert ("In 1 of 2 searches for settings, trials ran in parallel" in text) is is_said


@pytest.mark.parametrize("others", [0, 1], ids=["trials only", "and final runs that failed"])
def test_trials_without_a_finished_final_run_give_a_report(tmp_path, others):
    names = {"task": "digits", "arm": "sam", "budget": "tuning steps", "status": "finished"}
    records = [RunRecord(**names, metrics={"accuracy": 1.0})]
    records += [RunRecord("digits", "sam", seed=seed, status="failed", error={"type": "E"}) for seed in range(others)]
    text = write_report(records, tmp_path / "report").with_name("report.md").read_text()
    assert "tuned with 1 trials" in text


def test_runs_under_another_budget_stand_in_the_table_of_all_arms(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("flops",), arms=("adamw", "sam"), seeds=[0, 1])
    text = write_report(records, tmp_path / "report").with_name("report.md").read_text()
    assert "At flops: mean" in text


def test_unequal_tuning_is_named(tmp_path):
    records = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=[0, 1])
    trial = RunRecord(task="digits", arm="sam", budget="tuning steps", status="finished", metrics={"accuracy": 1.0})
    write_report([*records, trial], tmp_path / "report")
    assert "unequal numbers of trials (adamw 0, sam 1)" in (tmp_path / "report" / "report.md").read_text()


def test_conditions_sort_as_a_reader_expects():
    names = ["noise 0.4", "noise 0.2", "clean", "100 examples", "20 examples"]
    assert sorted(names, key=natural) == ["clean", "20 examples", "100 examples", "noise 0.2", "noise 0.4"]
    assert [noise_level(name) for name in ("clean", "noise 0.4", "noise 1", "noisy")] == [0.0, 0.4, 1.0, None]


def test_the_interval_over_examples_pairs_the_examples(tmp_path):
    records = fabricate(
        tmp_path, conditions=("noise 0.4",), budgets=("steps",), arms=("adamw", "sam"), seeds=range(3), predictions=True
    )
    study = make_study(records)
    gain = study.difference_over_examples(study.comparisons[0], np.random.default_rng(0))
    right = {
        arm: np.mean([study.predictions[run.path].correct for run in records if run.arm == arm], axis=0)
        for arm in ("adamw", "sam")
    }
    difference = right["sam"] - right["adamw"]
    assert gain.value == pytest.approx(difference.mean())
    half = 1.96 * difference.std() / np.sqrt(len(difference))
    assert (gain.low, gain.high) == pytest.approx((difference.mean() - half, difference.mean() + half), abs=0.005)


def test_there_is_no_interval_over_examples_where_seeds_were_tested_on_different_ones(tmp_path):
    records = fabricate(
        tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=range(2), predictions=True
    )
    study = make_study(records)
    for run in records:
        if run.seed == 1:
            kept = study.predictions[run.path]
            study.predictions[run.path] = type(kept)(kept.labels[::-1], kept.probabilities[::-1])
    assert study.difference_over_examples(study.comparisons[0], np.random.default_rng(0)) is None


# --- calibration ----------------------------------------------------------------------------------------------


def test_reliability_by_hand():
    confidence = np.array([0.55, 0.60, 0.95, 1.0, 0.90])
    correct = np.array([True, False, True, True, False])
    table = reliability(confidence, correct, bins=10)  # (0.5, 0.6], (0.8, 0.9], (0.9, 1]
    assert table.examples.tolist() == [2, 1, 2]
    assert table.accuracy.tolist() == [0.5, 0.0, 1.0]
    assert table.confidence.tolist() == pytest.approx([0.575, 0.9, 0.975])
    by_hand = 2 / 5 * abs(0.5 - 0.575) + 1 / 5 * 0.9 + 2 / 5 * 0.025
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(by_hand)


def test_a_calibrated_classifier_has_almost_no_calibration_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, size=200_000)
    assert expected_calibration_error(confidence, rng.random(200_000) < confidence) < 0.01


def test_predictions_that_are_not_there_or_of_another_form_are_left_out(tmp_path):
    assert read_predictions(tmp_path / "missing.parquet") is None
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert read_predictions(tmp_path / "broken.parquet") is None
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "other.parquet")
    assert read_predictions(tmp_path / "other.parquet") is None
    pd.DataFrame({"label": [1], "probabilities": [[0.1, float("nan")]]}).to_parquet(tmp_path / "nan.parquet")
    assert read_predictions(tmp_path / "nan.parquet") is None


def test_records_written_under_another_name_are_not_found(tmp_path):
    RunRecord(task="t", arm="a").write(tmp_path / "copy.json")
    RunRecord(task="t", arm="a").write(tmp_path / RECORD_NAME)
    assert len(find_records(tmp_path)[0]) == 1
