"""recipes/flatten.py through its command line: a short phase of SAM on checkpoints that are finished."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
from peft import PeftModel

from hf_sam.experiments.records import RECORD_NAME, read_record
from hf_sam.tasks import causal_lm, flatten, image_classification, text_classification
from hf_sam.tasks.command_line.errors import UserError

ROOT = Path(__file__).parents[2]
SHORT = ["--disable_tqdm=true", "--use_cpu=true", "--max_steps=2"]
TRAINED = [*SHORT, "--report_to=none", "--save_strategy=no", "--sam_rho=0"]
LM = ["--trainer=plain", "--max_length=16", "--activation_checkpointing=false"]


@pytest.fixture
def data(tmp_path):
    def write(name):
        (tmp_path / name).mkdir()
        return f"--dataset={stand_ins.write(name, tmp_path / name)}"

    return write


def test_an_encoder_is_flattened_on_the_data_of_its_record(encoder, data, tmp_path):
    finished = tmp_path / "finished"
    text_classification.main([data("texts"), f"--model_name_or_path={encoder}", *TRAINED, f"--output_dir={finished}"])
    words = [sys.executable, str(ROOT / "recipes/flatten.py"), str(finished), *SHORT]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (read_record(Path(f"{finished}{end}") / RECORD_NAME) for end in ("", "-flat"))
    assert after.config["recipe"]["phase"] == after.arm == "flatten"
    assert "phase" not in before.config["recipe"]
    assert after.config["sam"]["rho"] == 0.02
    assert after.config["training_arguments"]["learning_rate"] == 2e-5
    assert after.data == before.data
    card = (tmp_path / "finished-flat/README.md").read_text()
    assert "The finished model `finished` after a flatten phase on texts" in card
    assert "a flatten phase" not in (finished / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_an_adapter_is_flattened_by_its_own_factors(decoder, data, tmp_path, capsys):
    finished, flat = tmp_path / "lora", tmp_path / "flat"
    lora = ["--lora_r=2", "--lora_target_modules", "q_proj", f"--model_name_or_path={decoder}"]
    causal_lm.main([data("corpus"), *lora, *LM, *TRAINED, f"--output_dir={finished}"])
    trainer = flatten.main([str(finished), *SHORT, "--activation_checkpointing=false", f"--output_dir={flat}"])
    assert isinstance(trainer.model, PeftModel)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert trainer.sam_config.rho == 0.05  # of lora.yaml
    assert re.search(r"rho 0.05 \((.*/)?lora.yaml\)", capsys.readouterr().out)
    assert (flat / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="is already an adapter: leave out lora_r"):
        flatten.main(
            [
                str(finished),
                *SHORT,
                "--activation_checkpointing=false",
                "--lora_r=2",
                f"--output_dir={tmp_path / 'again'}",
            ]
        )


def test_every_option_overrides_the_defaults_of_the_phase(vision, data, tmp_path):
    finished, images = tmp_path / "vit", data("images")
    image_classification.main([images, f"--model_name_or_path={vision}", *TRAINED, f"--output_dir={finished}"])
    (finished / RECORD_NAME).unlink()
    with pytest.raises(UserError, match="has no run record with its data set: give --dataset"):
        flatten.main([str(finished), *SHORT])
    words = [images, *SHORT, "--sam_method", "asam", "--sam_rho", "0.5", "--learning_rate", "1e-3"]
    trainer = flatten.main([str(finished), *words, f"--output_dir={tmp_path / 'flat'}"])
    assert (trainer.sam_config.method, trainer.sam_config.rho) == ("asam", 0.5)
    assert trainer.args.learning_rate == 1e-3


def test_a_checkpoint_is_needed_and_has_to_have_a_head(encoder):
    with pytest.raises(UserError, match="Give the checkpoint first"):
        flatten.main([])
    with pytest.raises(UserError, match="Give the checkpoint first"):
        flatten.main(["--dataset=digits"])
    with pytest.raises(UserError, match=r"is unknown\. Give --checkpoints and --task"):
        flatten.main([encoder, "--dataset=digits"])
