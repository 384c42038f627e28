import json

import pytest
from fabricate import fabricate
from transformers import TrainerState

from hf_sam.experiments.external_runs import find_external_runs
from hf_sam.experiments.records import RECORD_NAME, RunRecord
from hf_sam.reporting.comparison import write_report


def test_outputs_of_a_real_trainer_are_read(make_trainer, tmp_path):
    trainer = make_trainer(seed=5, output_dir=tmp_path / "plain" / "seed-5")
    result = trainer.train()
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    (record,), problems = find_external_runs(tmp_path, task="toy")
    assert not problems
    assert (record.task, record.arm, record.seed, record.status) == ("toy", "plain", 5, "external")
    assert record.steps == 4
    assert record.seconds > 0
    assert set(record.metrics) == {"loss"}
    assert [entry["loss"] for entry in record.curves if "loss" in entry] == [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]


@pytest.mark.parametrize(
    ("folder", "arm", "seed"),
    [
        ("adamw-seed3", "adamw", 3),
        ("adamw/seed_3", "adamw", 3),
        ("adamw/seed=12", "adamw", 12),
        ("lr2e-5", "lr2e-5", None),
    ],
)
def test_arm_and_seed_are_read_from_the_folder(tmp_path, folder, arm, seed):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "all_results.json").write_text('{"eval_accuracy": 0.5, "eval_runtime": 3, "epoch": 2}')
    (record,), _ = find_external_runs(tmp_path, task="toy")
    assert (record.arm, record.seed, record.metrics) == (arm, seed, {"accuracy": 0.5})


def test_the_last_checkpoint_counts_where_the_folder_has_no_state(tmp_path):
    for step in (90, 100):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        TrainerState(global_step=step, log_history=[{"step": step, "eval_accuracy": step / 100}]).save_to_json(
            str(folder / "trainer_state.json")
        )
    (record,), _ = find_external_runs(tmp_path, task="toy")
    assert (record.arm, record.steps, record.metrics) == ("run", 100, {"accuracy": 1.0})


def test_the_test_metric_counts_before_the_evaluation_metric(tmp_path):
    (tmp_path / "all_results.json").write_text('{"eval_accuracy": 0.5, "test_accuracy": 0.4, "eval_f1": 0.3}')
    (record,), _ = find_external_runs(tmp_path, task="toy")
    assert record.metrics == {"accuracy": 0.4, "f1": 0.3}


@pytest.mark.parametrize("text", ["", "[1]", '{"log_history": 3}', "\x00"])
def test_broken_outputs_are_a_message(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    records, problems = find_external_runs(tmp_path, task="toy")
    assert not records
    assert len(problems) == 1
    assert str(tmp_path) in problems[0]


def test_runs_of_ours_are_not_external(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    RunRecord(task="t", arm="a").write(tmp_path / RECORD_NAME)
    assert find_external_runs(tmp_path, task="toy") == ([], [])


def test_external_runs_stand_beside_ours_and_are_never_paired(tmp_path):
    ours = fabricate(tmp_path / "ours", conditions=("clean",), budgets=("steps",), arms=("adamw", "sam"))
    for seed in range(5):
        folder = tmp_path / "theirs" / f"plain-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.123}))
    theirs, problems = find_external_runs(tmp_path / "theirs", task="digits")
    text = (write_report([*ours, *theirs], tmp_path / "report", problems=problems).parent / "report.md").read_text()
    assert "| digits | plain | 5 | 12.3 ± 0.0 |  | not paired |" in text
    assert "5 runs not written by hf\\_sam" in text
    comparisons = (tmp_path / "report" / "data" / "comparisons.csv").read_text()
    assert "plain" not in comparisons
