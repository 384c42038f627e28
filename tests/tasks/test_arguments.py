"""YAML files and command lines become dataclasses."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from hf_sam import SAMConfig
from hf_sam.tasks.command_line.arguments import SAMArguments, parse_arguments, read_config
from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.options import DataArguments, ModelArguments, RunArguments

KINDS = [ModelArguments, DataArguments, RunArguments, SAMArguments, TrainingArguments]


def parse(*argv):
    return parse_arguments(KINDS, [*argv, "--model_type=vit"])


def sam(*argv) -> SAMConfig:
    return parse(*argv)[3].to_config()


def test_no_two_classes_share_a_field():
    """The parser makes a field of two classes one argument, so it must be meant."""
    names = [field.name for kind in KINDS for field in dataclasses.fields(kind)]
    assert sorted(names) == sorted(set(names))


def test_every_field_of_the_configuration_is_an_argument():
    fields = {f"sam_{name}" for name in SAMConfig.fields()}
    assert {field.name for field in dataclasses.fields(SAMArguments)} == fields


def test_nothing_said_is_the_default_configuration():
    assert sam() == SAMConfig()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--sam_rho", "0"], {"rho": 0}),
        (["--sam_p", "inf"], {"p": float("inf")}),
        (["--sam_start", "10"], {"start": 10}),
        (["--sam_start", "0.5", "--sam_end", "0.9"], {"start": 0.5, "end": 0.9}),
        (["--sam_perturb", "norm"], {"perturb": "norm"}),
        (["--sam_perturb", "*.attention.*, *.mlp.*"], {"perturb": ["*.attention.*", "*.mlp.*"]}),
        (["--sam_replay_rng", "false"], {"replay_rng": False}),
        (["--sam_m=4", "--sam_scope=micro"], {"m": 4, "scope": "micro"}),
        (["--sam_method", "asam", "--sam_eta", "0"], {"method": "asam", "eta": 0.0}),
    ],
)
def test_sam_words(words, expected):
    assert sam(*words) == SAMConfig(**expected)


def test_a_step_and_a_fraction_stay_apart():
    assert isinstance(sam("--sam_start", "1").start, int)
    assert isinstance(sam("--sam_start", "0.1").start, float)


def test_file_then_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "learning_rate: 5e-5\nsam_rho: 0.1\nsave_strategy: no\nseed: 3\nsam_perturb: [a, b]\n"
    )
    _, _, _, sam_args, args = parse(str(tmp_path / "a.yaml"), "--seed", "4", "--sam-rho=0.2")
    assert (args.learning_rate, args.seed, args.save_strategy.value) == (5e-5, 4, "no")
    assert sam_args.to_config() == SAMConfig(rho=0.2, perturb=["a", "b"])


def test_a_file_starts_from_its_base_and_null_takes_a_key_back(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "seed: 1\nlearning_rate: 1\nmodel_type: vit\nconfig_overrides: {hidden_size: 8}\n"
    )
    (tmp_path / "top.yaml").write_text("base: base.yaml\nseed: 2\nlearning_rate: null\n")
    model, *_, args = parse_arguments(KINDS, [str(tmp_path / "top.yaml")])
    assert args.seed == 2
    assert args.learning_rate == TrainingArguments().learning_rate
    assert model.config_overrides == {"hidden_size": 8}


def test_lists_and_mappings_keep_their_types(tmp_path):
    (tmp_path / "a.yaml").write_text("class_names: [no, yes]\nlr_scheduler_kwargs: {num_cycles: 2}\n")
    _, data, *_, args = parse(str(tmp_path / "a.yaml"))
    assert data.class_names == ["no", "yes"]
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_the_word_no_is_no_boolean(tmp_path):
    (tmp_path / "a.yaml").write_text("eval_strategy: no\n")
    assert read_config(tmp_path / "a.yaml") == {"eval_strategy": "no"}


def test_an_option_that_names_a_json_file_is_no_configuration_file():
    assert parse("--dataset=reviews.json", "--seed=4")[1].dataset == "reviews.json"


def test_later_file_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1\ndata_seed: 5\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    args = parse(str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"))[-1]
    assert (args.seed, args.data_seed) == (2, 5)


def test_no_abbreviations():
    with pytest.raises(UserError, match="'learning' is not an argument"):
        parse("--learning", "1")


def test_message_has_the_users_own_name_for_a_sam_field():
    with pytest.raises(UserError, match=r"^sam_m=4 splits micro-batches"):
        sam("--sam_m=4", "--sam_scope=global")


# --- a rho belongs to its method -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A file for plain SAM, one for GSAM on top of it, and one that switches SAM off."""
    (tmp_path / "sam.yaml").write_text("sam_rho: 0.01\nsam_scope: global\nlearning_rate: 1e-4\n")
    (tmp_path / "gsam.yaml").write_text("base: sam.yaml\nsam_method: gsam\nsam_alpha: 0.2\nsam_rho_min: 0.3\n")
    (tmp_path / "late.yaml").write_text("sam_method: late\nsam_rho: 0.02\nsam_start: 0.9\nsam_second_order: null\n")
    (tmp_path / "off.yaml").write_text("sam_rho: 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sam.yaml"], {"rho": 0.01, "scope": "global"}),
        (["sam.yaml", "--sam_method", "sam"], {"rho": 0.01, "scope": "global"}),
        (["sam.yaml", "--sam_method", "asam"], {"method": "asam", "scope": "global"}),
        (["sam.yaml", "--sam-method=msam"], {"method": "msam"}),  # which has no scope either
        (
            ["sam.yaml", "--sam_method=norm-only", "--sam_rho=0.2"],
            {"method": "norm-only", "rho": 0.2, "scope": "global"},
        ),
        (["gsam.yaml"], {"method": "gsam", "alpha": 0.2, "rho_min": 0.3, "scope": "global"}),
        (["gsam.yaml", "--sam_method=looksam"], {"method": "looksam", "scope": "global"}),
        (["gsam.yaml", "--sam_method=sam"], {"scope": "global"}),
        (["late.yaml", "--sam_method=sam"], {}),  # `start` is what makes it late
        (["off.yaml"], {"rho": 0}),
        (["off.yaml", "--sam_method=asam"], {"method": "asam"}),
        (["off.yaml", "--sam_method=sam"], {}),
        (["off.yaml", "--sam_method=sam", "--sam_rho=0"], {"rho": 0}),
    ],
)
def test_a_method_named_later_drops_what_was_meant_for_another(files, words, expected):
    words = [str(files / word) if word.endswith(".yaml") else word for word in words]
    assert parse(*words)[3].to_config() == SAMConfig(**expected)
    assert parse(*words)[4].learning_rate == (1e-4 if "sam.yaml" in words[0] else 5e-5)


def test_only_the_default_of_a_method_tested_from_scratch_is_pointed_out(files):
    def is_pointed_out(*words):
        return parse(*words)[3].has_rho_for_training_from_scratch

    assert is_pointed_out("--sam_method=msam")
    assert is_pointed_out(str(files / "sam.yaml"), "--sam_method=asam")  # whose rho is that of sam, and is dropped
    assert not is_pointed_out("--sam_method=msam", "--sam_rho=0.1")
    assert not is_pointed_out()


def test_the_configuration_in_force_says_where_each_value_comes_from(files):
    told = parse(str(files / "sam.yaml"), "--sam_method", "asam", "--sam_eta=0.1")[3].explain()
    assert told == (
        "method asam (command line), rho 0.5 (default of asam), adaptive True (default of asam), "
        "eta 0.1 (command line), scope global (sam.yaml); left out: sam_rho=0.01 of sam.yaml, which was for sam"
    )
    off = parse(str(files / "off.yaml"), "--sam_method=msam")[3].explain()
    assert off.endswith("; left out: sam_rho=0 of off.yaml, which switched SAM off")
    assert parse()[3].explain() == "method sam (default), rho 0.005 (default), sigma 0.03 (default)"
    told = parse("--sam_method=lesam", '--sam_options={"sigma": 0.3, "decay_start": 1}')[3].explain()
    assert "sigma 0.3 (command line)" in told
    assert "{'decay_start': 1.0} (command line)" in told
    assert parse(str(files / "off.yaml"))[3].explain() == "no SAM: rho 0 (off.yaml)"
