"""recipes/forgetting.py through its command line: tiny classifiers and language models on a second task."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_ins
import yaml

from hf_sam.experiments.execution import JOB_NAME, execute
from hf_sam.experiments.json_files import write_json
from hf_sam.experiments.records import RECORD_NAME, RunRecord, read_record
from hf_sam.reporting.document import write_document
from hf_sam.reporting.forgetting import make_forgetting_document, paths_of
from hf_sam.tasks import causal_lm, forgetting, image_classification
from hf_sam.tasks.command_line.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 8, "patch_size": 4}'
SHORT = ["--report_to=none", "--disable_tqdm=true", "--use_cpu=true", "--save_strategy=no", "--max_steps=2"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A ViT fine-tuned on all ten digits."""
    folder = tmp_path_factory.mktemp("start")
    data = ["--dataset=digits", "--train_samples=40", "--test_samples=40"]
    image_classification.main(
        [*data, "--model_type=vit", f"--config_overrides={TINY}", *SHORT, f"--output_dir={folder}"]
    )
    return str(folder)


@pytest.fixture
def second(tmp_path):
    """Another task with two classes, on images of the same size."""
    (tmp_path / "second").mkdir()
    data = stand_ins.write("images", tmp_path / "second")
    return {"dataset": data, "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "image_size": 8}


def run_task(*words):
    words = [sys.executable, str(ROOT / "recipes/forgetting.py"), *words]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_a_pattern_names_replicates_in_the_order_of_their_numbers(tmp_path):
    for name in ("seed-10", "seed-9"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed-1.json").touch()  # not a checkpoint
    common = {"recipe": "causal_lm", "learning_rates": [1e-3]}
    args = forgetting.ForgettingArguments(checkpoints=[f"sam={tmp_path}/seed-*", "adamw=some/hub-id"], **common)
    assert args.starts == {"sam": [f"{tmp_path}/seed-9", f"{tmp_path}/seed-10"], "adamw": ["some/hub-id"]}
    (tmp_path / "run[1]").mkdir()  # a name, not a pattern
    args = forgetting.ForgettingArguments(checkpoints=[f"a={tmp_path}/run[1]"], **common)
    assert args.starts == {"a": [f"{tmp_path}/run[1]"]}
    with pytest.raises(ValueError, match=r"checkpoints: .*/sede-\* matches no folder"):
        forgetting.ForgettingArguments(checkpoints=[f"sam={tmp_path}/sede-*"], **common)


@pytest.mark.slow
def test_a_grid_is_trained_once_and_a_second_call_makes_what_is_missing(start, second, tmp_path, capsys):
    plan = {
        **{"checkpoints": [f"adamw={start}", f"sam={start}"], "recipe": "image_classification"},
        **{"learning_rates": [1.0e-3], "settings": second, "output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    done = run_task(str(tmp_path / "plan.yaml"))
    assert done.returncode == 0, done.stderr
    results = sorted((tmp_path / "out/runs").rglob("forgetting.json"))
    assert len(results) == 2
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    a, b = (json.loads(path.read_text()) for path in results)
    assert a["first"] == b["first"]  # the same checkpoint, learning rate and seed
    assert a["second"]["train_loss"] == read_record(results[0].parent / RECORD_NAME).metrics["train_nll"]
    before = json.loads((tmp_path / "out/before.json").read_text())["scores"][start]
    assert before["accuracy"] == read_record(f"{start}/{RECORD_NAME}").metrics["accuracy"]
    assert before["loss"] != a["first"]["loss"]
    times = [path.stat().st_mtime_ns for path in results]
    results[1].unlink()
    words = [str(tmp_path / "plan.yaml"), "--learning_rates", "0.001"]
    forgetting.main(words)
    assert "1 of 2 runs are finished." in capsys.readouterr().out
    assert results[0].stat().st_mtime_ns == times[0]
    assert json.loads(results[1].read_text()) == b
    text = (tmp_path / "out/report/report.md").read_text()
    assert "sam minus adamw: +0.000 (one pair, no interval)" in text
    with pytest.raises(UserError, match=r"was run with other settings \(--max_steps=2, --max_steps=3\)"):
        forgetting.main([*words, "--settings", json.dumps({**second, "max_steps": 3})])


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_evaluation_is_only_evaluated(start, second, tmp_path, capsys):
    words = [
        f"a={start}",
        "--recipe=image_classification",
        "--learning_rates",
        "1e-3",
        f"--output_dir={tmp_path / 'o'}",
    ]
    words += ["--settings", json.dumps(second), "--keep_models=true"]
    forgetting.main(words)
    (result,) = (tmp_path / "o").rglob(forgetting.RESULT_NAME)
    scores, record = result.read_text(), result.with_name(RECORD_NAME)
    trained = record.stat().st_mtime_ns
    result.unlink()
    forgetting.main([*words, "--status=true"])
    assert "0 running, 0 queued" in capsys.readouterr().out
    forgetting.main(words)
    assert (result.read_text(), record.stat().st_mtime_ns) == (scores, trained)
    assert "finished  a, learning rate 0.001, seed 0" in capsys.readouterr().out


def test_scores_on_another_first_task_are_refused(tmp_path):
    def workshop(**changes):
        common = {"checkpoints": ["a=x"], "recipe": "causal_lm", "learning_rates": [1e-3], "output_dir": str(tmp_path)}
        return forgetting.ForgettingWorkshop(forgetting.ForgettingArguments(**common | changes))

    made = workshop()
    (run,) = made.runs
    write_json(made.folder(run) / JOB_NAME, made.job(run))
    RunRecord("second", "a", status="finished").write(made.folder(run) / RECORD_NAME)
    write_json(made.folder(run) / forgetting.RESULT_NAME, {})
    workshop().check_unchanged()
    for changes, name in (({"first": {"dataset": "other"}}, "first"), ({"max_examples": 5}, "max_examples")):
        with pytest.raises(UserError, match=rf"was run with other settings \({name}\)"):
            workshop(**changes).check_unchanged()


def test_a_run_that_cannot_be_evaluated_on_the_first_task_has_failed(start, second, tmp_path):
    folder = tmp_path / "runs/a/checkpoint-0/lr-0.001/seed-0"
    args = forgetting.ForgettingArguments(
        [f"a={start}"], "image_classification", [1e-3], settings=second, output_dir=str(tmp_path)
    )
    workshop = forgetting.ForgettingWorkshop(args)
    (run,) = workshop.runs
    record = read_record(f"{start}/{RECORD_NAME}")
    record.write(folder / RECORD_NAME)
    shutil.copy(f"{start}/config.json", folder)
    (folder / "run.json").write_text(json.dumps(workshop.job(run)))
    assert not workshop.has_ended(run)
    with pytest.raises((OSError, UserError)):  # its model is not there
        execute(folder)
    workshop.forget(run)
    assert workshop.has_ended(run)
    assert workshop.record(run).status == "failed"


def test_a_failed_run_is_named_and_the_others_go_on(start, second, tmp_path):
    words = [
        f"a={start}",
        "--recipe=image_classification",
        "--learning_rates",
        "1e-3",
        f"--output_dir={tmp_path / 'out'}",
    ]
    with pytest.raises(UserError, match=r"lr-0.001/seed-0: UserError: label_column=kind is not a column"):
        forgetting.main([*words, "--settings", json.dumps({**second, "label_column": "kind"})])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.slow
def test_a_language_model_forgets_its_first_corpus_and_an_adapter_is_merged(decoder, tmp_path):
    (tmp_path / "data").mkdir()
    data = stand_ins.write("corpus", tmp_path / "data")
    lm = {"trainer": "plain", "max_length": 16, "max_steps": 2, "use_cpu": True, "activation_checkpointing": False}
    words = [
        f"--dataset={data}",
        f"--model_name_or_path={decoder}",
        *(f"--{k}={v}" for k, v in lm.items()),
        *SHORT[:-1],
    ]
    causal_lm.main([*words, f"--output_dir={tmp_path / 'whole'}"])
    causal_lm.main([*words, "--lora_r=2", "--lora_target_modules", "q_proj", f"--output_dir={tmp_path / 'adapter'}"])
    settings = json.dumps({**lm, "dataset": data})
    options = ["--recipe=causal_lm", "--settings", settings, "--learning_rates", "1e-4", "1e-2", "--workers=2"]
    forgetting.main(
        [f"a={tmp_path / 'whole'}", f"b={tmp_path / 'adapter'}", *options, f"--output_dir={tmp_path / 'out'}"]
    )
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("forgetting.json")]
    assert len(results) == 4
    assert all(result["second"]["train_loss"] == np.log(result["second"]["train_perplexity"]) for result in results)
    assert (tmp_path / "out/starts/b-0/config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe=image_clasification"], "is not a training recipe. Did you mean 'image_classification'"),
        (["--recipe=causal_lm", "--learning_rates", "0"], "must be distinct numbers above 0"),
        (["--recipe=causal_lm", "--learning_rates", "1e-3", "1.0000001e-3"], "must be distinct numbers above 0"),
        (["--recipe=causal_lm", "--seeds", "1", "1"], r"seeds=\[1, 1\] must be distinct whole numbers from 0 to 99999"),
        (["--recipe=causal_lm", "--checkpoints", "SAM/1=x", "sam-1=y"], "SAM/1 and sam-1 would share a folder"),
        (["--recipe=causal_lm", "--settings", '{"learning_rate": 1}'], "settings: learning_rate is set for each run"),
        (["--recipe=causal_lm", "--settings", "max_steps=3"], "settings='max_steps=3' is not valid JSON"),
        (["--recipe=causal_lm", "--workers=0"], "workers=0 must be at least 1"),
        (["--recipe=causal_lm", "--executor=slurn"], "executor='slurn' is unknown"),
        (
            ["--recipe=causal_lm", "--executor_options", "quue=3"],
            r"executor\.local\.quue is unknown\. Allowed: workers",
        ),
    ],
)
def test_a_mistake_is_one_line(words, message):
    with pytest.raises(UserError, match=message):
        forgetting.main(["a=nowhere", "--learning_rates", "1e-4", *words])


def test_a_start_without_record_needs_its_data(start, tmp_path):
    shutil.copytree(start, tmp_path / "start", ignore=shutil.ignore_patterns(RECORD_NAME))
    with pytest.raises(UserError, match="has no run record with its data set"):
        forgetting.main([f"a={tmp_path / 'start'}", "--recipe=image_classification", "--learning_rates", "1e-4"])


# --- the report ----------------------------------------------------------------------------------------------------


def fabricated(shifts, replicates=4):
    """Frontiers on which `first = shift / train_loss`, more where a replicate is unlucky."""
    return [
        {
            **{"start": name, "checkpoint": name, "seed": replicate, "replicate": replicate, "learning_rate": rate},
            "second": {"train_loss": loss, "accuracy": 0.8},
            "first": {"loss": shift / loss + 0.01 * replicate, "accuracy": 0.7},
        }
        for name, shift in shifts.items()
        for replicate in range(replicates)
        for rate, loss in ((1e-5, 2.0), (1e-4, 1.0), (1e-3, 0.5))
    ]


def test_the_report_compares_at_the_matched_training_loss(tmp_path):
    runs = fabricated({"adamw": 1.0, "sam": 0.9})
    assert paths_of(runs)["sam"][0] == [(2.0, 0.45), (1.0, 0.9), (0.5, 1.8)]
    before = {"adamw": [{"loss": 0.3, "accuracy": 0.9}], "sam": [{"loss": 0.4, "accuracy": 0.9}]}
    document = make_forgetting_document(runs, before, {"first task": "<a>"}, ["adamw", "sam"], target=1.0)
    html = write_document(document, tmp_path).read_text()
    assert "&lt;a&gt;" in html
    text = (tmp_path / "report.md").read_text().replace("\\", "")
    assert "at a second-task training loss of 1.000" in text
    assert "adamw: 1.015 ± 0.013 (4 replicates)" in text
    assert "sam minus adamw: -0.100 [" in text
    assert "(4 pairs, paired t-test p" in text
    assert "| adamw | before |" in text
    numbers = json.loads((tmp_path / "data/numbers.json").read_text())
    assert numbers["differences"][0]["difference"] == pytest.approx(-0.1)


def test_runs_that_diverged_are_left_out_and_named(tmp_path):
    runs = fabricated({"adamw": 1.0, "sam": 0.9}, replicates=1)
    before = {"adamw": [{"loss": 0.3, "accuracy": 0.9}], "sam": [{"loss": None, "accuracy": None}]}
    for run in runs[2::3]:  # the largest rate
        run["second"] = {"train_loss": None, "accuracy": None}
        run["first"] = {"loss": None, "accuracy": 0.1}
    write_document(make_forgetting_document(runs, before, {}, ["adamw", "sam"]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "at a second-task training loss of 1.000" in text
    assert "2 runs diverged and are left out; their learning rates: 0.001." in text
    assert "| sam | before |  |  | - | - |" in text
    with pytest.raises(ValueError, match="Every run diverged: give smaller learning_rates"):
        make_forgetting_document(runs[2::3], before, {}, ["adamw", "sam"])


def test_a_training_loss_that_nobody_has_in_common_is_said(tmp_path):
    runs = fabricated({"adamw": 1.0, "sam": 0.9}, replicates=1)
    for run in runs:
        if run["start"] == "sam":
            run["second"]["train_loss"] /= 100
    before = {name: [{"loss": 0.3, "accuracy": 0.9}] for name in ("adamw", "sam")}
    write_document(make_forgetting_document(runs, before, {}, ["adamw", "sam"]), tmp_path)
    assert "have no second-task training loss in common" in (tmp_path / "report.md").read_text()
    write_document(make_forgetting_document(runs, before, {}, ["adamw", "sam"], target=1.0), tmp_path)
    assert "sam: 1 replicates never reach that training loss" in (tmp_path / "report.md").read_text()
