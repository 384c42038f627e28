import pytest
import yaml

from hf_sam import SAMConfig
from hf_sam.experiments.plan import (
    averaging_of,
    command_line,
    final_runs,
    mean_passes,
    settings_of,
    slug,
    stretched,
    trial_runs,
)
from hf_sam.experiments.plan_file import read_plan
from hf_sam.experiments.records import RunRecord
from hf_sam.experiments.tuning import best_trial, in_space, next_settings, open_storage

STUDY = {
    "recipe": "image_classification",
    "task": "digits",
    "arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05}},
}
PASSES = {"adamw": 1.0, "sam": 2.0, "looksam": 1.2}


@pytest.fixture
def plan(tmp_path):
    def read(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
        return read_plan(path)

    return read


def runs_of(plan):
    return final_runs(plan, lambda task, arm: PASSES[arm])


def test_equal_passes_gives_cheaper_arms_more_steps_and_shares_what_is_the_same_run(plan):
    runs = runs_of(plan(budgets=["steps", "passes"], seeds=[0], arms={"adamw": {}, "sam": {}, "looksam": {}}))
    assert [(run.arm, run.budget, run.stretch, run.cost) for run in runs] == [
        ("adamw", "steps", 1.0, 1.0),
        ("adamw", "passes", 2.0, 2.0),
        ("sam", "steps+passes", 1.0, 2.0),
        ("looksam", "steps", 1.0, 1.2),
        ("looksam", "passes", pytest.approx(2 / 1.2), pytest.approx(2.0)),
    ]


def test_runs_come_seed_by_seed_and_none_twice(plan):
    comparison = plan(seeds=[3, 1], conditions={"clean": None, "noise 0.4": {"label_noise": 0.4}}, budgets=["steps"])
    runs = runs_of(comparison)
    assert [run.seed for run in runs] == [3] * 4 + [1] * 4
    assert len({run.folder for run in runs}) == len(runs)


def test_every_arm_gets_the_same_seeds_and_conditions(plan):
    comparison = plan(seeds=[7], conditions={"noise 0.4": {"label_noise": 0.4}}, settings={"logging_steps": 5})
    settings = [settings_of(comparison, run, {}, {"max_steps": 10}) for run in runs_of(comparison)]
    differing = {key for key in settings[0] if settings[0][key] != settings[1][key]}
    assert differing == {"sam_rho", "arm"}
    assert settings[0] | {"seed": 7, "subset_seed": 7, "noise_seed": 7, "label_noise": 0.4} == settings[0]


def test_a_trial_has_a_validation_split_and_a_final_run_has_none(plan):
    comparison = plan(tuning={"trials": 2, "space": {"learning_rate": [0.1, 0.01]}, "validation_size": 0.25}, seeds=[0])
    run = runs_of(comparison)[0]
    trial = trial_runs(comparison, run)[1]
    tried = settings_of(comparison, trial, {"learning_rate": 0.1}, {"max_steps": 10})
    assert tried["validation_size"] == 0.25
    assert (tried["budget"], tried["learning_rate"], tried["seed"]) == ("tuning steps", 0.1, 1000)
    assert "validation_size" not in settings_of(comparison, run, {}, {"max_steps": 10})
    assert trial.folder != run.folder


def test_lengths_are_stretched_to_whole_steps():
    assert stretched({"max_steps": 10}, 5 / 3) == {"max_steps": 16}
    assert stretched({"max_steps": 10}, 1.1 * 10 / 11) == {"max_steps": 10}
    assert stretched({"num_train_epochs": 3.0}, 2.0) == {"num_train_epochs": 6.0}
    assert stretched({"max_steps": 10}, 1) == {"max_steps": 10}


def test_command_line_can_be_parsed_again():
    words = command_line("a.yaml", {"bf16": True, "names": ["a", "b"], "over": {"x": 1}, "lr": 1e-5, "no": None}, "out")
    assert words == ["a.yaml", "--bf16=true", "--names", "a", "b", '--over={"x": 1}', "--lr=1e-05", "--output_dir=out"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SAMConfig(rho=0), 1.0),
        (SAMConfig(), 2.0),
        (SAMConfig(ascent_steps=3), 4.0),
        (SAMConfig(method="late", start=0.75), 1.25),
        (SAMConfig(method="periodic", interval=5), 1.2),
        (SAMConfig(method="looksam", interval=4), 1.25),
        (SAMConfig(method="subset", ascent_fraction=0.25), 1.25),
        (SAMConfig(method="random"), 1.0),
        (SAMConfig(end=0.5), 1.5),
    ],
)
def test_passes_per_step_of_published_methods(config, expected):
    assert mean_passes(config, 1000) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, "arm is not a key of a comparison. Did you mean 'arms'"),
        ({"arms": {}}, "`arms` must map at least one name"),
        ({"arms": ["adamw"]}, "`arms` must map"),
        ({"arms": {"adamw": 3}}, "arms adamw must map settings to values"),
        ({"arms": {"adamw": {5: 0}}}, r"arms adamw: \[5\] are not names of settings"),
        ({"conditions": {"clean": [1]}}, "conditions clean must map"),
        ({"settings": [1]}, "`settings` must be a mapping"),
        ({"recipe": None}, "task digits needs a `recipe`"),
        ({"tasks": {"a": {"recipe": "x"}}}, "give either `recipe` and `config`, or `tasks`"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml of task digits does not exist"),
        ({"seeds": 3}, "seeds=3 must be a list of distinct whole numbers"),
        ({"seeds": [1, 1]}, "must be a list of distinct whole numbers"),
        ({"budgets": ["time"]}, "budgets=.'time'. must be a list of: steps, passes"),
        ({"question": {"control": "adam"}}, "question.control='adam' is not an arm. Allowed: adamw, sam"),
        ({"question": {"treatmnt": "sam"}}, "question.treatmnt is not a key of a comparison. Did you mean 'treatment'"),
        ({"budgets": ["steps", "steps"]}, "must be a list of: steps, passes"),
        ({"budgets": [["steps"]]}, "must be a list of: steps, passes"),
        ({"conditions": {}}, "`conditions` must map at least one name to settings, or be left out"),
        ({"arms": {"off": {}, False: {}}}, "arms False: YAML reads on, off, yes, no and null as values"),
        ({"arms": {"x" * 300: {}}}, "must have at most 200 characters"),
        ({"launcher": "accelerate launch"}, r"launcher='accelerate launch' must be a list of words"),
        ({"sharpness": ["sam"]}, "`sharpness` must be true, false or a mapping"),
        ({"survival": {"bits": 4}}, "survival.bits=4 must be a list"),
        ({"reference_passes": "two"}, "reference_passes='two' must be a number above 0"),
        ({"keep_models": "no"}, "keep_models='no' must be true or false"),
        ({"output_dir": {"a": 1}}, "output_dir=.* must be a path"),
        ({"config": 5}, "config=5 of task digits must be a path"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be at least 1"),
        ({"arms": {"swa": {"average": "mean"}}}, "average='mean' is unknown. Allowed: swa, ema"),
        ({"arms": {"swa": {"average_start": 0.5}}}, "average_start is used only with average"),
        ({"arms": {"a b": {}, "a-b": {}}}, "arms 'a b' and 'a-b' would share a folder. Rename one"),
        ({"tuning": {"trials": 0}}, "tuning.trials=0 must be a whole number, at least 1"),
        ({"tuning": {"trials": 1, "space": {"lr": [1]}, "parallel": 0}}, "tuning.parallel=0 must be at least 1"),
        ({"executor": 3}, "`executor` must be local, ray, slurm, or a mapping"),
        ({"tuning": {"trials": 1}}, "no search space for arm adamw"),
        ({"tuning": {"trials": 1, "space": {"lr": {"low": 1}}}}, "the search space of lr must be a list of choices or"),
        (
            {"tuning": {"trials": 1, "space": {"lr": {"low": "1e-5", "high": 1.0}}}},
            "write 1.0e-5, since YAML reads 1e-5 as text",
        ),
        (
            {"tuning": {"trials": 1, "space": {"lr": [1]}, "spaces": {"sma": {}}}},
            "tuning.spaces has unknown arms: sma. Allowed: adamw",
        ),
        ({"tuning": {"trials": 1, "space": ["lr"]}}, "tuning.space must be a mapping"),
        ({"tuning": {"trials": 1, "space": {"lr": [1]}, "spaces": {"sam": None}}}, "tuning.spaces.sam must map"),
        ({"tuning": {"trials": 1, "space": {"lr": [1]}, "seed": "a"}}, "tuning.seed='a' must be a whole number"),
        (
            {"tuning": {"trials": 1, "space": {"steps": {"low": 1.5, "high": 3.5, "int": True}}}},
            "low=1.5 and high=3.5 must be whole numbers with int",
        ),
        ({"tuning": {"trials": 1, "space": {"lr": [1]}, "validation_size": 1.0}}, "validation_size=1.0 must be in"),
    ],
)
def test_a_wrong_study_is_one_readable_line(plan, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        plan(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must contain lines"),
        ("a: 1\na: 2", "'a' is given twice"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_study_is_a_message(tmp_path, text, message):
    if text is not None:
        (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "study.yaml")


def test_names_that_yaml_reads_as_numbers_keep_their_place(plan):
    read = plan(arms={0.0: {}, "sam": {}}, launcher=["accelerate", "launch", "--num_processes", 2], sharpness=True)
    assert list(read.arms) == ["0.0", "sam"]
    assert (read.question.control, read.question.treatment) == ("0.0", "sam")
    assert read.launcher[-1] == "2"
    assert read.sharpness == {}


def test_averaging_is_read_from_an_arm():
    assert averaging_of({"sam_rho": 0}) is None
    assert type(averaging_of({"average": "entropy-sgd"})).__name__ == "EntropySGD"
    with pytest.raises(ValueError, match="entropy-sgd does not use average_decay"):
        averaging_of({"average": "entropy-sgd", "average_decay": 0.9})
    averaging = averaging_of({"average": "ema", "average_decay": 0.9})
    assert (averaging.kind, averaging.decay) == ("ema", 0.9)


def test_folders_are_plain():
    assert [slug(name) for name in ("SAM, rho 0.05", "../../etc", "", "noise 0.4")] == [
        "sam-rho-0.05",
        "etc",
        "x",
        "noise-0.4",
    ]


# --- tuning ----------------------------------------------------------------------------------------------------

SPACE = {"x": {"low": -1.0, "high": 1.0}, "rate": {"low": 1e-5, "high": 1.0, "log": True}, "kind": ["a", "b"]}


def search(trials, score, metric="accuracy", storage=None):
    """Trials and records of a whole search, one after the other."""
    made = []
    for _ in range(trials):
        tried = next_settings(SPACE, 1, metric, made, storage)
        made.append((tried, RunRecord(task="t", arm="a", status="finished", metrics={metric: score(tried)})))
    return [tried for tried, _ in made], [record for _, record in made]


def test_the_search_is_the_same_whoever_goes_on_with_it_and_whether_its_storage_is_kept_or_lost(tmp_path):
    storage = open_storage(tmp_path)
    tried, done = search(8, lambda settings: -(settings["x"] ** 2), storage=storage)
    assert len({settings["x"] for settings in tried}) == 8
    for index in range(8):
        earlier = list(zip(tried, done, strict=True))[:index]
        assert next_settings(SPACE, 1, "accuracy", earlier) == tried[index]  # knowing only the records
        assert next_settings(SPACE, 1, "accuracy", earlier, open_storage(tmp_path)) == tried[index]
    assert len(storage.get_all_trials(0)) == 8  # a trial that was asked for twice is one trial


def test_a_trial_beside_another_one_tries_something_else_and_both_are_told_in_the_end():
    tried, done = search(5, lambda settings: -(settings["x"] ** 2))
    earlier = list(zip(tried, done, strict=True))
    storage = open_storage(None, "sqlite://")
    first = next_settings(SPACE, 1, "accuracy", earlier, storage)
    second = next_settings(SPACE, 1, "accuracy", [*earlier, (first, None)], storage)
    assert first != second
    late = RunRecord(task="t", arm="a", status="finished", metrics={"accuracy": 0.5})
    next_settings(SPACE, 1, "accuracy", [*earlier, (first, None), (second, late)], storage)
    next_settings(SPACE, 1, "accuracy", [*earlier, (first, late), (second, late)], storage)
    states = [trial.state.name for trial in storage.get_all_trials(1)]
    assert states == ["COMPLETE"] * 7 + ["RUNNING"]


def test_the_search_finds_better_settings_than_its_random_start():
    tried, done = search(30, lambda settings: -((settings["x"] - 0.3) ** 2))
    best = tried[best_trial("accuracy", done)]
    assert abs(best["x"] - 0.3) < 0.1
    assert abs(best["x"] - 0.3) <= min(abs(settings["x"] - 0.3) for settings in tried)


def test_less_is_better_where_the_metric_says_so():
    records = [RunRecord(task="t", arm="a", metrics={"nll": value}) for value in (0.5, 0.2, None, 0.9)]
    assert best_trial("nll", records) == 1
    for record in records:
        record.metrics["accuracy"] = record.metrics["nll"]
    assert best_trial("accuracy", records) == 3
    assert best_trial("mcc", records) is None


def test_a_failed_trial_does_not_stop_the_search():
    done = [({"x": 0.0, "rate": 0.1, "kind": "a"}, RunRecord(task="t", arm="a", status="failed"))]
    assert set(next_settings(SPACE, 1, "accuracy", done)) == {"x", "rate", "kind"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"x": 0.0, "rate": 0.1, "kind": "b"}, True),
        ({"x": 2.0, "rate": 0.1, "kind": "b"}, False),
        ({"x": 0.0, "rate": 0.1, "kind": "c"}, False),
        ({"x": 0.0, "rate": 0.1}, False),
    ],
)
def test_a_trial_of_another_space_is_found_out(settings, expected):
    assert in_space(SPACE, settings) is expected
