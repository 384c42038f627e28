"""recipes/survival.py, the section in recipes/report.py, and `survival: true` of a comparison, through their command lines."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import stand_ins
import yaml
from fabricate import fabricate

from hf_sam.experiments.execution import JOB_NAME, execute
from hf_sam.experiments.records import RECORD_NAME, find_records, read_record
from hf_sam.reporting.comparison import write_report
from hf_sam.reporting.plots import draw_survival
from hf_sam.reporting.statistics import holm
from hf_sam.reporting.study import make_study
from hf_sam.reporting.survival_of_arms import cell_frame, paired_survival
from hf_sam.tasks import causal_lm, compare, image_classification, report, survival
from hf_sam.tasks.command_line import early
from hf_sam.tasks.command_line.errors import UserError

TINY = '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4}'
DIGITS = [
    *("--dataset=digits", "--model_type=vit", f"--config_overrides={TINY}", "--train_samples=40", "--test_samples=40"),
    *("--max_steps=3", "--report_to=none", "--disable_tqdm=true", "--use_cpu=true", "--save_strategy=no"),
]
FEW = ["--bits", "4", "2", "--group_sizes", "0", "--pruned_shares", "0.5", "--noise_sizes", "0.3", "--noise_draws", "2"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two runs of different seeds, as folders."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        image_classification.main([*DIGITS, f"--seed={seed}", f"--output_dir={folder / str(seed)}"])
    return [str(folder / str(seed)) for seed in (0, 1)]


def test_scores_of_two_checkpoints_are_written_and_recorded(checkpoints, tmp_path):
    first, second = checkpoints
    words = [f"a={first}", f"b={second}", *FEW]
    words += [
        "--merge_with",
        f"other={second}",
        "--merge_points",
        "0.5",
        f"--output_dir={tmp_path}",
        "--disable_tqdm=true",
    ]
    survival.main(words)
    record = json.loads((tmp_path / "survival.json").read_text())
    scores = pd.DataFrame(record["scores"])
    assert list(scores[scores.checkpoint == "a"].kind) == [
        *("none", "bits per channel", "bits per channel", "dynamic int8", "pruned", "noise", "merged with other"),
    ]
    plain = scores[scores.kind == "none"].set_index("checkpoint").value
    kept = read_record(f"{first}/{RECORD_NAME}")
    assert plain["a"] == pytest.approx(kept.metrics["accuracy"])
    assert kept.survival == record["checkpoints"]["a"]["rows"]
    assert [row["draw"] for row in kept.survival if row["kind"] == "noise"] == [0, 1]
    merged = scores[scores.kind == "merged with other"].set_index("checkpoint").value
    assert merged["b"] == pytest.approx(plain["b"])  # with itself
    text = (tmp_path / "report.md").read_text()
    assert "| 4 bits per channel | " in text
    assert "b minus a" in text
    assert "Embeddings and the head were not altered" in text
    assert (tmp_path / "figures/survival.svg").is_file()


def test_the_report_on_checkpoints_has_it_as_a_section(checkpoints, tmp_path):
    words = [checkpoints[0], *FEW, "--treatments", "prune", "--corruption_samples=0", "--disable_tqdm=true"]
    report.main([*words, "--survival=true", f"--output_dir={tmp_path}", "--max_examples=20"])
    text = (tmp_path / "report.md").read_text()
    assert "## What survives" in text
    assert "the same 20 examples" in text
    assert "| 50 % pruned |" in text
    report.main([*words, f"--output_dir={tmp_path / 'without'}"])
    assert "--survival true measures them" in (tmp_path / "without/report.md").read_text()


@pytest.mark.parametrize("task", ["survival", "report"])
def test_a_mistyped_option_is_named_before_anything_is_loaded(task):
    early.check(
        task, ["a=x", "b=y", "--bits", "4", "2", "--noise_draws=1", "--dataset", "digits", "--max_examples", "9"]
    )
    with pytest.raises(
        UserError, match=r"'max_example' is not an argument of this recipe. Did you mean 'max_examples'"
    ):
        early.check(task, ["a=x", "--max_example", "9"])


def test_what_cannot_be_merged_or_does_not_exist_is_one_line(checkpoints, tmp_path):
    other = tmp_path / "other"
    wider = TINY.replace('"hidden_size": 8', '"hidden_size": 16')
    image_classification.main([*DIGITS, f"--config_overrides={wider}", f"--output_dir={other}"])
    words = [checkpoints[0], *FEW, f"--output_dir={tmp_path / 'out'}", "--disable_tqdm=true"]
    with pytest.raises(
        UserError, match=r"other: vit.embeddings.cls_token has the shape \(1, 1, 16\) instead of \(1, 1, 8\)"
    ):
        survival.main([*words, "--merge_with", str(other)])
    with pytest.raises(UserError, match="nowhere cannot be loaded"):
        survival.main([*words, "--merge_with", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=r"split=dev does not exist\. Allowed: train, test"):
        survival.main([*words, "--split=dev"])
    with pytest.raises(UserError, match="bits: 0 must be a whole number from 1 to 16"):
        survival.main([*words, "--bits", "0"])


def test_a_language_model_is_measured_by_its_loss(decoder, tmp_path):
    (tmp_path / "data").mkdir()
    data = stand_ins.write("corpus", tmp_path / "data")
    words = [
        f"--dataset={data}",
        f"--model_name_or_path={decoder}",
        "--trainer=plain",
        "--max_length=16",
        "--max_steps=2",
    ]
    words += [
        "--report_to=none",
        "--disable_tqdm=true",
        "--use_cpu=true",
        "--save_strategy=no",
        "--activation_checkpointing=false",
        "--bf16=false",
    ]
    causal_lm.main([*words, f"--output_dir={tmp_path / 'lm'}"])
    record = survival.main([str(tmp_path / "lm"), *FEW, f"--output_dir={tmp_path / 'out'}", "--disable_tqdm=true"])
    assert record["metric"] == "loss"
    perplexity = read_record(tmp_path / "lm" / RECORD_NAME).metrics["perplexity"]
    assert record["scores"][0]["value"] == pytest.approx(np.log(perplexity), rel=1e-5)
    assert {"loss", "perplexity"} <= record["checkpoints"]["lm"]["rows"][0].keys()


# --- comparisons ---------------------------------------------------------------------------------------------------


def test_a_run_of_a_comparison_keeps_scores_and_no_weights(tmp_path):
    job = {
        "recipe": "image_classification",
        "argv": [*DIGITS, f"--output_dir={tmp_path}"],
        **{"names": {}, "average": {}, "is_trial": False, "sharpness": None, "keep_model": False},
        "survival": {"treatments": ["prune"], "pruned_shares": [0.5]},
    }
    (tmp_path / JOB_NAME).write_text(json.dumps(job))
    execute(tmp_path)
    run = read_record(tmp_path / RECORD_NAME)
    assert [row["kind"] for row in run.survival] == ["none", "pruned"]
    assert run.survival[0]["accuracy"] == pytest.approx(run.metrics["accuracy"])
    assert not list(tmp_path.rglob("*.safetensors"))


GAIN = {"adamw": 0.0, "sam": 0.02}


def records_with_survival(folder, seeds):
    """SAM is as good as AdamW as trained and 2 points better at 4 bits; at 2 bits both are at chance."""
    records = fabricate(folder, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=seeds)
    for run in records:
        score = 0.9 + 0.002 * run.seed
        run.survival = [
            {"kind": "none", "level": None, "draw": 0, "accuracy": score, "nll": 0.3, "ece": 0.02},
            {"kind": "bits per channel", "level": 4, "draw": 0, "accuracy": score - 0.1 + GAIN[run.arm], "nll": 0.5},
            {"kind": "bits per channel", "level": 2, "draw": 0, "accuracy": 0.1, "nll": 3.0},
            *(
                {"kind": "noise", "level": 0.2, "draw": i, "accuracy": score + shift}
                for i, shift in enumerate((-0.2, -0.4))
            ),
            {"kind": "torchao-int4", "level": None, "draw": 0, "problem": "ImportError: no torchao"},
        ]
        run.write()
    return records


def test_the_report_of_a_comparison_pairs_scores_over_seeds(tmp_path):
    written = write_report(records_with_survival(tmp_path, range(4)), tmp_path / "report", control="adamw")
    text = written.with_name("report.md").read_text()
    answer, _, section = text.replace("\\", "").partition("## What survives")
    for part in (answer, section):  # in the answer of the report, and again where the numbers are
        assert "sam against adamw, by accuracy: better after 4 bits per channel (+2.0); undecided after" in part
    assert "| 4 bits per channel | 80.3 ± 0.3 | 82.3 ± 0.3 | +2.0 [+1.7, +2.3] | better |" in section
    assert "| as trained | 90.3 ± 0.3 | 90.3 ± 0.3 | +0.0 [-0.3, +0.3] | undecided |" in section
    assert "| as trained | 90.3 ± 0.3 | 90.3 ± 0.3 |" in text
    assert "| 4 bits per channel | 80.3 ± 0.3 (-10.0) | 82.3 ± 0.3 (-8.0) |" in text
    assert "| noise of 0.2 sd | 60.3 ± 0.3 (-30.0) |" in text  # the mean of its two draws
    assert "Could not be measured (adamw, seed 0, adamw, seed 1" in text
    assert "torchao-int4: ImportError: no torchao" in text
    drawn = pd.read_csv(tmp_path / "report/data/survival-1.csv")
    assert set(drawn.kind) == {"none", "bits per channel"}
    frame = cell_frame(make_study(find_records(tmp_path)[0], control="adamw").cells[0], ["adamw", "sam"])
    entries = paired_survival(frame, "adamw", "accuracy", np.random.default_rng(0))
    four = next(entry for entry in entries if entry.treatment.level == 4)
    assert four.score.difference.value == pytest.approx(0.02)
    assert four.change.difference.value == pytest.approx(0.02)
    assert [entry.p_holm for entry in entries[1:]] == holm([entry.score.t_p for entry in entries[1:]])


def test_a_diverged_arm_has_no_curve_and_the_others_do(tmp_path):
    """The loss of a diverged language model is null in its record."""
    records = fabricate(
        tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam", "asam"), seeds=[0, 1]
    )
    lost = {"sam": (0, 1, 2), "asam": (0,)}  # asam only as trained
    for run in records:
        run.metrics = {"loss": 1.0}
        levels = enumerate((("none", None), ("bits per channel", 4), ("bits per channel", 3)))
        run.survival = [
            {"kind": kind, "level": level, "draw": 0, "loss": None if index in lost.get(run.arm, ()) else 1.0 + index}
            for index, (kind, level) in levels
        ]
        run.write()
    write_report(find_records(tmp_path)[0], tmp_path / "report", control="adamw", metric="loss")
    drawn = pd.read_csv(tmp_path / "report/data/survival-1.csv")
    assert set(drawn.name) == {"adamw", "asam"}
    canvas, _ = draw_survival(drawn, ["adamw", "sam", "asam"], "loss")
    assert [line.get_xdata().tolist() for line in canvas.axes[0].lines] == [[0, 1, 2], [], [1, 2]]


def test_a_problem_of_one_task_is_told_though_another_task_has_the_same_arms_and_seeds(tmp_path):
    records = fabricate(tmp_path, conditions=("clean", "noise 0.4"), budgets=("steps",), arms=("adamw",), seeds=[0])
    scored = {"kind": "none", "level": None, "draw": 0, "accuracy": 0.9}
    problem = {"kind": "torchao-int4", "level": None, "draw": 0, "problem": "ImportError: no torchao"}
    for run in records:
        run.survival = [scored, problem] if run.condition == "clean" else [scored]
    text = write_report(records, tmp_path / "report").with_name("report.md").read_text()
    assert "Could not be measured (adamw, seed 0): torchao-int4: ImportError: no torchao" in text.replace("\\", "")


def test_one_seed_gives_no_interval_and_runs_without_scores_are_counted(tmp_path):
    records = records_with_survival(tmp_path, [0])
    extra = fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("asam",), seeds=[0])
    written = write_report([*records, *extra], tmp_path / "report", control="adamw", treatment="sam")
    text = written.with_name("report.md").read_text()
    assert "one seed says nothing about sam against adamw" in text
    assert "1 finished runs lack these scores" in text


def test_a_comparison_that_did_not_ask_has_no_such_section(tmp_path):
    written = write_report(
        fabricate(tmp_path, conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"), seeds=[0]),
        tmp_path / "report",
    )
    assert "What survives" not in written.with_name("report.md").read_text()


@pytest.mark.slow
def test_a_comparison_keeps_only_scores_and_pairs_them(tmp_path):
    base = {word[2:].split("=")[0]: word.split("=", 1)[1] for word in DIGITS}
    del base["save_strategy"], base["report_to"], base["disable_tqdm"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "output_dir": "x"}))
    plan = {
        **{"recipe": "image_classification", "config": "base.yaml", "task": "digits", "seeds": [0, 1, 2]},
        "question": {"control": "adamw", "treatment": "sam", "metric": "accuracy"},
        "arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05}},
        "survival": {"bits": [4, 2], "group_sizes": [0], "treatments": ["quantize"]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    written = compare.main([str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out")])
    records, _ = find_records(tmp_path / "out")
    assert [len(run.survival) for run in records] == [3] * 6
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    for run in records:
        assert run.survival[0]["accuracy"] == pytest.approx(run.metrics["accuracy"])
    text = written.with_name("report.md").read_text()
    assert "## What survives" in text
    assert "sam against adamw, by accuracy: " in text
    assert "| 2 bits per channel | sam | 3 |" in text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"bit": [4]}, "survival.bit is not a key of a comparison. Did you mean 'bits'"),
        ({"bits": [0]}, "survival.bits: 0 must be a whole number from 1 to 16"),
        (3, "`survival` must be true, false or a mapping, not 3"),
    ],
)
def test_a_plan_with_a_wrong_treatment_is_refused_before_any_run(value, message, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        yaml.safe_dump({"recipe": "image_classification", "task": "t", "arms": {"a": {}}, "survival": value})
    )
    with pytest.raises(ValueError, match=message):
        compare.main([str(path), "--plan"])
