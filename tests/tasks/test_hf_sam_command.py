"""`hf-sam`: its subcommands, their help, what is refused before torch is imported, and what it looks up."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import stand_ins
import yaml
from conftest import ROOT
from transformers import TrainingArguments

from hf_sam import METHODS
from hf_sam.tasks import TRAINING, benchmark, find_rho, report, sharpness, survival
from hf_sam.tasks.command_line import config_files, early, errors, help, launching
from hf_sam.tasks.command_line.config_files import find_config, read_layers, resolve, shipped_configs
from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.program import look_over
from hf_sam.tasks.command_line.subcommands import SUBCOMMANDS, main

SCREEN = 56  # lines


def printed(capsys, *words: str) -> str:
    """What `hf-sam` prints, whether it ends by itself or by `SystemExit(0)`."""
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise
    return capsys.readouterr().out


# --- help --------------------------------------------------------------------------------------------------------------


def test_the_overview_has_every_subcommand_and_the_training_tasks_are_those_of_the_package(capsys):
    text = printed(capsys)
    assert {name.replace("_", "-") for name in TRAINING} < SUBCOMMANDS.keys()
    for name, subcommand in SUBCOMMANDS.items():
        assert f" {name} {subcommand.summary}" in " ".join(text.split()), name
    assert text == printed(capsys, "--help")


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_help_of_a_subcommand_fits_a_screen(name, capsys):
    lines = printed(capsys, name, "--help").splitlines()
    assert lines[0].startswith(f"usage: hf-sam {name} ")
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", TRAINING)
def test_a_tasks_own_options_come_first_then_sams_and_the_rest_is_behind_help_all(name, capsys):
    text = printed(capsys, name, "--help")
    own = next(kind for kind in _module(name).ARGUMENTS if kind.__module__ == f"hf_sam.tasks.{name}")
    order = [f"\n  --{dataclasses.fields(own)[0].name} ", "\n  --dataset ", "\n  --sam_rho ", "--learning_rate"]
    places = [text.index(option) for option in order]
    assert places == sorted(places)
    assert "--adam_beta1" not in text
    whole = printed(capsys, name, "--help-all")
    fields = {field.name for kind in _module(name).ARGUMENTS for field in dataclasses.fields(kind) if field.init}
    assert {field for field in fields if not re.search(rf"--{field}\b", whole)} == set()


def _module(name: str):
    return importlib.import_module(f"hf_sam.tasks.{name}")


def test_help_names_the_command_that_was_used(monkeypatch, capsys):
    assert help.command_words("find_rho") == ["hf-sam", "find-rho"]
    script = ROOT / "recipes/find_rho.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert help.command_words("causal_lm") == ["python", "recipes/causal_lm.py"]
    assert "python recipes/find_rho.py image_classification" in help.describe("find_rho")


def test_a_search_for_rho_goes_on_by_the_command_that_started_it(monkeypatch):
    words = [str(find_config("image_classification/digits")), "--label_noise", "0.4"]
    named = "image_classification/digits --label_noise 0.4 --sam_rho=0.05"
    assert find_rho.next_command("image_classification", words, 0.05) == f"hf-sam image-classification {named}"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/find_rho.py")])
    assert find_rho.next_command("image_classification", ["a.yaml"], 0) == (
        "python recipes/image_classification.py a.yaml --sam_rho=0"
    )


@pytest.mark.parametrize("task", [report, sharpness, survival, benchmark])
def test_the_first_look_refuses_no_argument_that_a_task_of_any_data_has(task, monkeypatch):
    class Seen(Exception): ...

    def parse(kinds, argv):
        raise Seen({field.name for kind in kinds for field in dataclasses.fields(kind) if field.init})

    monkeypatch.setattr(task, "parse_arguments", parse)
    for name in ("image-classification", "text-classification", "causal-lm"):
        with pytest.raises(Seen) as seen:
            task.main(["--checkpoints", "x", "--task", name])
        assert seen.value.args[0] - early.arguments_of(task.__name__.rpartition(".")[2]).keys() == set()


# --- what is refused before torch is imported ----------------------------------------------------------------------------

STUDY = {
    "recipe": "image_classification",
    "config": str(ROOT / "configs/image_classification/digits.yaml"),
    "arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05}},
}
STUDIES = {
    "good": {},
    "key": {"budgest": ["steps"]},
    "recipe": {"recipe": "image_clasification"},
    "arm": {"arms": {"adamw": {"sam_roh": 0}, "sam": {}}},
    "number": {"settings": {"learning_rate": "fast"}},
    "method": {"arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_method": "asma"}}},
    "average": {"arms": {"adamw": {"average": "mean"}, "sam": {}}},
}
# Words, {} a folder with the studies above, and the line that ends them.
REFUSED = [
    (
        ["image-clasification"],
        r"'image-clasification' is not a subcommand of hf-sam. Did you mean 'image-classification'\?",
    ),
    (["train"], "'train' is not a subcommand of hf-sam. `hf-sam --help` lists them."),
    (
        ["image-classification", "digist"],
        r"digist is neither a file nor the name of a shipped configuration.* mean 'digits'\?",
    ),
    (["text_classification", "glue_mprc.yaml"], r"glue_mprc.yaml is neither a file.* Did you mean 'glue_mrpc'\?"),
    (["image-classification", "digits", "--sam_roh", "1"], r"'sam_roh' is not an argument .* Did you mean 'sam_rho'\?"),
    (["image-classification", "digits", "--sam_rho", "big"], "argument --sam_rho: invalid float value: 'big'"),
    (
        ["image-classification", "digits", "--sam_method", "sma"],
        "sam_method='sma' is unknown. Did you mean .*Allowed: ",
    ),
    (["causal-lm", "--num_processes", "two"], "num_processes=two must be a whole number, at least 1."),
    (["causal-lm", "--num_processes"], "argument --num_processes: expected one argument"),
    (
        ["causal-lm", "--accelerate_config", "fspd2"],
        r"accelerate_config=fspd2 is neither a file .* Did you mean 'fsdp2'\?",
    ),
    (
        ["causal-lm", "--num_processes", "2", "--sam_roh", "1"],
        r"'sam_roh' is not an argument .* Did you mean 'sam_rho'\?",
    ),
    (["sharpness", "--checkpoint", "x"], r"'checkpoint' is not an argument .* Did you mean 'checkpoints'\?"),
    (["report", "outputs/a", "--test_sample=4"], r"'test_sample' is not an argument .* Did you mean 'test_samples'\?"),
    (["survival", "outputs/a", "--merge_wiht", "b"], r"'merge_wiht' is not an argument .* mean 'merge_with'\?"),
    (
        ["forgetting", "a=outputs/a", "--lerning_rates", "1"],
        r"'lerning_rates' is not an argument .* 'learning_rates'\?",
    ),
    (["benchmark", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
    (["benchmark", "nowhere.yaml"], "Configuration file nowhere.yaml does not exist."),
    (["demo", "--seeds", "0"], "seeds=0 must be at least 1."),
    (["demo", "--output", "x"], "'output' is not an argument .* Did you mean 'output_dir'"),
    (["configs", "dinov2_smal"], "dinov2_smal is neither a file .*Did you mean 'dinov2_small'"),
    (["compare"], "Give the YAML file of a comparison, such as .*"),
    (["compare", "nowhere.yaml"], "Configuration file nowhere.yaml does not exist."),
    (["compare", "{}/goood.yaml"], "Configuration file .*goood.yaml does not exist. Did you mean 'good.yaml'"),
    (["image-classification", "digits", "--lr", "0.1"], "'lr' is not an argument .* Did you mean 'learning_rate'"),
    (["text-classification", "minilm", "--data=a.csv"], "'data' is not an argument .* Did you mean 'dataset'"),
    (["sharpness", "--samples", "64"], "'samples' is not an argument .* Did you mean 'num_examples'"),
    (["compare", "{}/good.yaml", "--wokers", "2"], r"'wokers' is not an argument .* Did you mean 'workers'\?"),
    (["compare", "{}/good.yaml", "--workers", "0"], "workers=0 must be at least 1."),
    (["compare", "{}/good.yaml", "--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
    (["compare", "{}/good.yaml", "--set", "max_steps"], "--set takes key=value pairs, not 'max_steps'."),
    (["compare", "{}/good.yaml", "--set", "max_step=3"], r"--set: 'max_step' is not an argument .* mean 'max_steps'\?"),
    (["compare", "{}/key.yaml"], r".*key.yaml: budgest is not a key of a comparison. Did you mean 'budgets'\?"),
    (["compare", "{}/recipe.yaml"], r"recipe 'image_clasification' does not exist. Did you mean 'image_class.*"),
    (["compare", "{}/arm.yaml"], r"arm adamw: 'sam_roh' is not an argument .* Did you mean 'sam_rho'\?"),
    (["compare", "{}/number.yaml"], "settings of the study: argument --learning_rate: invalid float value: 'fast'"),
    (["compare", "{}/method.yaml"], "arm sam: sam_method='asma' is unknown. Did you mean 'asam'. Allowed: .*"),
    (["compare", "{}/average.yaml"], "average='mean' is unknown. Allowed: swa, ema, entropy-sgd."),
    (["find-rho"], "the following arguments are required: recipe"),
    (["find-rho", "digits.yaml"], "Give the recipe first, such as image_classification, then its command line."),
    (["find-rho", "compare", "digits"], "recipe 'compare' does not exist. Allowed: .*"),
    (["find-rho", "image-classification", "digist"], r"digist is neither a file.* Did you mean 'digits'\?"),
    (["find-rho", "image-classification", "digits", "--budget", "0"], "budget=0 must be above 0 .*"),
    (["find-rho", "image-classification", "digits", "--points", "few"], "argument --points: invalid int value: 'few'"),
    (
        ["find-rho", "image-classification", "digits", "--label_nose", "1"],
        "'label_nose' is not an argument .*'label_noise'.*",
    ),
]


def test_mistakes_end_in_one_line_each_before_torch_is_imported(tmp_path):
    for name, changes in STUDIES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    code = (
        "import json, sys\n"
        "from hf_sam.tasks.command_line.subcommands import main\n"
        "for words in json.load(sys.stdin):\n"
        "    try:\n"
        "        main(words)\n"
        "        print('accepted', file=sys.stderr)\n"
        "    except SystemExit as ended:\n"
        "        if ended.code != 2:\n"
        "            print('exit', ended.code, file=sys.stderr)\n"
        "assert sys.modules.keys().isdisjoint({'torch', 'transformers', 'numpy', 'pandas', 'datasets'})\n"
    )
    words = [[word.format(tmp_path) for word in line] for line, _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(words),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(os.pathsep.join([str(tmp_path), str(ROOT)])),
    )
    lines = done.stderr.splitlines()
    assert len(lines) == len(REFUSED), done.stderr
    wrong = [
        (given, line)
        for (given, expected), line in zip(REFUSED, lines, strict=True)
        if not re.match(f"error: {expected}", line)
    ]
    assert wrong == []


def environment(path: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.mark.parametrize("study", sorted((ROOT / "configs/comparison").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_first_look_lets_every_committed_comparison_pass(study):
    early.check("compare", [study.stem])


@pytest.mark.parametrize(
    "name", ["image_classification/digits", "text_classification/glue_mrpc", "causal_lm/chat_lora"]
)
def test_a_shipped_configuration_goes_by_its_name_with_or_without_folder_and_suffix(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _, stem = name.partition("/")
    path = str(shipped_configs()[name])
    for word in (name, stem, f"{stem}.yaml", f"{name}.yaml", f"configs/{name}.yaml", path):
        assert look_over(folder, [word, "--sam_rho=0"]) == [path, "--sam_rho=0"]
    assert config_files.config_name(path) == name
    assert config_files.config_name("digits") is None


def test_a_file_on_disk_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.yaml").write_text("seed: 1\n")
    assert resolve(["digits.yaml"], "image_classification") == ["digits.yaml"]
    assert resolve(["digits"], "image_classification") == [str(shipped_configs()["image_classification/digits"])]


def test_a_name_that_several_folders_have_is_not_guessed():
    with pytest.raises(UserError, match=r"Several configurations are named digits: .*image_classification/digits"):
        find_config("digits")


def test_a_file_of_the_users_own_starts_from_a_shipped_one(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: image_classification/digits\nseed: 5\n")
    layers = read_layers(tmp_path / "mine.yaml")
    assert [name for name, _ in layers] == ["digits.yaml", "mine.yaml"]


# --- processes -----------------------------------------------------------------------------------------------------------


def test_what_is_meant_for_accelerate_goes_to_it_and_the_rest_to_the_task():
    words = ["digits", "--accelerate_config", "fsdp2", "--sam_rho", "0.1", "--num-processes=2", "--machine_rank", "0"]
    options, rest = launching.split_launch_options(words)
    assert rest == ["digits", "--sam_rho", "0.1"]
    fsdp2 = str(ROOT / "configs/accelerate/fsdp2.yaml")
    assert options == {"accelerate_config": fsdp2, "num_processes": "2", "machine_rank": "0"}
    command = launching.launch_words("image-classification", options, rest)
    assert command == [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", fsdp2, "--num_processes", "2", "--machine_rank", "0"),
        *("-m", "hf_sam", "image-classification", "digits", "--sam_rho", "0.1"),
    ]
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.module, parsed.training_script, parsed.num_processes) == (True, "hf_sam", 2)
    assert parsed.training_script_args == ["image-classification", "digits", "--sam_rho", "0.1"]


def test_several_processes_without_a_gpu_get_the_configuration_for_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    cpu = str(ROOT / "configs/accelerate/cpu.yaml")
    assert launching.with_default({"num_processes": "2"}) == {"accelerate_config": cpu, "num_processes": "2"}
    assert launching.with_default({"num_processes": "1"}) == {"num_processes": "1"}
    (tmp_path / "none.yaml").write_text("num_processes: 4\n")  # the user's own
    assert launching.with_default({"num_processes": "2"}) == {"num_processes": "2"}


@pytest.mark.slow
def test_two_processes_by_one_option(tmp_path):
    (tmp_path / "data").mkdir()
    data = stand_ins.write("images", tmp_path / "data")
    vit = '{"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}'
    words = ["image-classification", f"--dataset={data}", "--model_type=vit", f"--config_overrides={vit}"]
    words += ["--max_steps=2", "--per_device_train_batch_size=2", "--use_cpu=true", "--output_dir=out"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_sam", *words, "--num_processes=2", "--accelerate_config=cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(str(ROOT)),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out/run_record.json").read_text())
    assert record["environment"]["hardware"]["processes"] == 2


# --- what it looks up ------------------------------------------------------------------------------------------------------


def test_the_table_of_methods_has_each_with_its_passes_and_copies(capsys):
    lines = printed(capsys, "methods").splitlines()
    names = [line.split()[0] for line in lines[1:-2]]
    assert names == list(METHODS)
    assert any(re.fullmatch(r"sam +2 +1 +Step along the gradient at w \+ eps.*", line) for line in lines)
    assert any(re.fullmatch(r"aesam +<= 2 +\d +SAM in steps .*", line) for line in lines)
    rows = json.loads(printed(capsys, "methods", "--json"))
    assert {row["method"]: row["rho"] for row in rows}["asam"] == 0.5


def test_env_has_what_a_bug_report_needs(capsys):
    text = printed(capsys, "env")
    for name in ("hf-sam", "Python", "platform", "torch", "transformers", "accelerate", "devices"):
        assert re.search(rf"^- {name}: \S", text, flags=re.MULTILINE), name
    assert str(ROOT) in text


def test_every_shipped_configuration_is_listed_and_a_copy_of_one_finds_what_it_starts_from(capsys, tmp_path):
    listed = [line.split()[0] for line in printed(capsys, "configs").splitlines() if line]
    assert listed == list(shipped_configs())
    assert re.search(r"/digits_asam +as digits, with sam_method asam", printed(capsys, "configs"))
    assert set(listed) == {
        path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }
    copy = tmp_path / "mine.yaml"
    copy.write_text(printed(capsys, "configs", "digits_sam"))
    assert read_layers(copy)[0] == read_layers(find_config("digits_sam"))[0]
    copy.write_text(printed(capsys, "configs", "comparison/digits"))
    early.check("compare", [str(copy)])
    path = printed(capsys, "configs", "--path", "digits_sam").strip()
    assert path == str(ROOT / "configs/image_classification/digits_sam.yaml")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["image-c"], ["image-classification"]),
        (["image-classification", "--sam_rho_"], ["--sam_rho_schedule", "--sam_rho_min"]),
        (["image-classification", "image_classification/digits_r"], ["image_classification/digits_resnet"]),
        (["compare", "--retry"], ["--retry_failed"]),
        (["compare", "comparison/che"], ["comparison/cheap"]),
        (["causal-lm", "--accelerate_config", "fs"], ["fsdp2"]),
    ],
)
def test_completion_in_bash(words, found, capsys, tmp_path):
    script = printed(capsys, "completion", "bash")
    given = " ".join(f"'{word}'" for word in ["hf-sam", *words])
    script += f'COMP_WORDS=({given})\nCOMP_CWORD={len(words)}\n_hf_sam\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stderr == ""
    assert done.stdout.split() == found


# --- what is installed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["sklearn.metrics", "PIL", "matplotlib", "datasets", "evaluate", "pandas"])
def test_a_package_that_is_not_installed_is_one_line_with_the_extra(module, capsys, monkeypatch):
    extras = {
        "recipes": ["scikit-learn", "pillow", "matplotlib", "datasets>=4", "evaluate", "pandas"],
        "tune": ["optuna"],
    }
    listed = [f"{package}; extra == '{extra}'" for extra, packages in extras.items() for package in packages]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["torch>=2.7", *listed])
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: _raise(ModuleNotFoundError(f"No module named {module!r}", name=module)))
    assert ended.value.code == 2
    name = module.split(".")[0]
    assert capsys.readouterr().err == f"error: {name} is not installed: pip install 'hf-sam[recipes]'\n"
    assert errors.how_to_install("optuna.trial") == "pip install 'hf-sam[tune]'"
    assert errors.how_to_install("torch") == "pip install torch"


def test_a_module_that_no_extra_has_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError):
        errors.run(lambda: _raise(ModuleNotFoundError("No module named 'mine'", name="mine")))


def _raise(error: Exception):
    raise error


def test_the_usual_extra_has_all_that_any_subcommand_imports():
    """What is not at the top of a module is only for those who ask for it, and has an extra of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *project["optional-dependencies"]["recipes"],
        "numpy",
        "tqdm",
        "jinja2",
        "filelock",
        "psutil",  # of accelerate
        "markupsafe",  # of jinja2
    ]
    names = {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in listed}
    names |= {"huggingface-hub", "hf-sam", "trl"}  # of transformers; ours; imported only where it is there
    imported = set()
    for path in (ROOT / "hf_sam").rglob("*.py"):
        if path.is_relative_to(ROOT / "hf_sam/testing"):
            continue
        found = re.findall(r"^(?:import|from) (\w+)", path.read_text(), flags=re.MULTILINE)
        imported |= {errors.DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in found}
    standard = {name.replace("_", "-") for name in sys.stdlib_module_names}
    assert imported - standard - names == set()


def test_the_wheel_lists_every_folder_of_the_package_and_the_configurations():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "hf_sam").rglob("*.py")}
    assert {*(".".join(folder.relative_to(ROOT).parts) for folder in folders), "hf_sam.configs"} == set(
        tool["packages"]
    )
    assert tool["package-dir"]["hf_sam.configs"] == "configs"
    data = {suffix for patterns in tool["package-data"].values() for suffix in patterns}
    assert data >= {"py.typed", "*/*.yaml", "templates/*"}


def test_training_arguments_are_recognised_in_every_training_task():
    for name in TRAINING:
        assert any(issubclass(kind, TrainingArguments) for kind in _module(name).ARGUMENTS)
