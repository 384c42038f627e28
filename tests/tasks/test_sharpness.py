"""`recipes/sharpness.py` on checkpoints of each task: what it writes, what it reads from a run's record, what it refuses."""

import json
import re
from pathlib import Path

import peft
import pytest
import torch
from sharpness import toys
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_sam.experiments.records import RunRecord, read_record
from hf_sam.tasks import checkpoints, report, sharpness

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "quickly", "well"]
FAST = [
    *("--measures", "sam", "m", "worst", "average", "hessian", "gauss_newton", "density", "slice_1d", "slice_2d"),
    *("--m", "4", "--steps", "2", "--draws", "2", "--probes", "2", "--eigenvalues", "2", "--lanczos_steps", "3"),
    *("--lanczos_draws", "1", "--points", "3", "--directions", "1", "--max_products", "20", "--disable_tqdm", "true"),
]
CHEAP = ["--measures", "sam", "--disable_tqdm", "true"]


@pytest.fixture
def recipe():
    return sharpness


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["[PAD]", "[UNK]", "[END]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


def text_config(**options) -> BertConfig:
    return BertConfig(**{**toys.TINY, "vocab_size": 3 + len(WORDS), "max_position_embeddings": 128}, **options)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A file of labelled texts, the training and test rows in one."""
    rows = [
        {"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 3 + i % 5)), "label": i % 2} for i in range(24)
    ]
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "bert"
    BertForSequenceClassification(text_config(num_labels=2)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def image_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=10, initializer_range=0.2)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, do_convert_rgb=True).save_pretrained(folder)
    return folder


def test_images_from_the_run_record_to_the_report(recipe, tmp_path):
    first, second = image_model(tmp_path / "first", 1), image_model(tmp_path / "second", 2)
    data = {"dataset": "digits", "train_samples": 40, "label_noise": 0.2, "class_names": None}
    record = RunRecord("digits", "AdamW", config={"recipe": {"data": data, "images": {"image_column": None}}})
    record.write(first / "run_record.json")
    out = tmp_path / "out"
    names = [f"<b>plain={first}", f"other={second}"]
    words = ["--num_examples", "8", "--batch_size", "5", "--line", "true", "--line_points", "3"]
    found = recipe.main(["--checkpoints", *names, *words, *FAST, "--output_dir", str(out)])

    written = json.loads((out / "sharpness.json").read_text())
    assert written["checkpoints"].keys() == {"<b>plain", "other"}
    assert written["subset"]["examples"] == written["subset"]["labels"] == 8
    assert written["subset"]["epoch_examples"] == 40, "the data are those of the run record"
    for entry in written["checkpoints"].values():
        assert entry["fingerprint"] == written["subset"]["fingerprint"]
        assert set(FAST[1:10]) == entry["measures"].keys()
        assert entry["scalars"]["sam_0.05"] > 0
    (line,) = written["lines"]
    assert line["losses"][0] == written["checkpoints"]["<b>plain"]["scalars"]["loss"]
    assert line["losses"][-1] == written["checkpoints"]["other"]["scalars"]["loss"]

    html, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<b>plain" not in html
    assert "<b>plain" not in re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)  # a command is shown as it is
    assert "not a verdict" in markdown
    for name in ("sharpness-rho", "hessian-spectrum", "slices", "planes", "lines"):
        assert (out / "figures" / f"{name}.svg").stat().st_size > 1000
        assert (out / "data" / f"{name}.csv").is_file()
    assert read_record(first / "run_record.json").sharpness == found["checkpoints"]["<b>plain"]["scalars"]
    assert not (second / "run_record.json").exists()


def test_a_folder_with_an_equals_sign_is_a_checkpoint_without_a_name(recipe, tmp_path):
    folder = tmp_path / "lr=0.1" / "seed-0"
    folder.mkdir(parents=True)
    assert checkpoints.named_checkpoints([str(folder), f"sam={folder}"]) == {
        "seed-0": str(folder),
        "sam": str(folder),
    }
    assert checkpoints.named_checkpoints(["sam=org/model"]) == {"sam": "org/model"}


def test_an_option_written_with_hyphens_goes_before_the_run_record(recipe, tmp_path):
    RunRecord("digits", "sam", config={"recipe": {"data": {"dataset": "digits", "test_samples": 40}}}).write(
        tmp_path / "run_record.json"
    )
    words = ["--checkpoints", str(tmp_path), "--test-samples", "10"]
    assert checkpoints.recorded_data(words) == ["--dataset=digits"]


def test_a_checkpoint_of_diverged_weights_is_refused(recipe, text_model, texts, tmp_path):
    model = BertForSequenceClassification.from_pretrained(text_model)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    tokenizer().save_pretrained(tmp_path / "nan")
    words = ["--checkpoints", str(tmp_path / "nan"), "--dataset", str(texts), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(recipe.UserError, match="nan: The loss is NaN or infinite"):
        recipe.main([*words, "--measures", "sam", "--rho", "0.05"])
    with pytest.raises(recipe.UserError, match="nan gives NaN or infinite values"):
        report.main([*words, "--corruption_samples", "0", "--disable_tqdm", "true"])


def test_the_batch_size_changes_no_number(recipe, text_model, texts, tmp_path):
    def scalars(batch_size):
        words = ["--dataset", str(texts), "--batch_size", str(batch_size), "--dtype", "float64"]
        measures = ["--measures", "sam", "m", "average", "density", "hessian"]
        found = recipe.main(
            [
                "--checkpoints",
                str(text_model),
                *words,
                *FAST,
                *measures,
                "--tolerance",
                "1e-6",
                "--output_dir",
                str(tmp_path),
            ]
        )
        return found["checkpoints"]["bert"]["scalars"]

    assert scalars(3) == pytest.approx(scalars(100), rel=1e-6, abs=1e-9)


def test_causal_language_models_count_tokens(recipe, texts, tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 8, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=3 + len(WORDS), **sizes, bos_token_id=2, eos_token_id=2))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    words = ["--dataset", str(texts), "--trainer", "plain", "--max_length", "16", "--test_size", "0.5"]
    found = recipe.main(
        ["--checkpoints", str(tmp_path / "gpt2"), *words, *CHEAP, "--num_examples", "10", "--output_dir", str(tmp_path)]
    )
    lengths = 0
    splits, _ = checkpoints.TASKS["causal-lm"].read_data(
        *recipe.parse_arguments([recipe.DataArguments, checkpoints.TASKS["causal-lm"].arguments], words)
    )
    for row in checkpoints.fixed_rows(splits["train"], 10, seed=0):
        lengths += len(row["text"].split())  # with its end, one more token than is predicted
    assert found["subset"]["labels"] == lengths


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_an_adapter_is_merged_or_measured_as_its_factors(recipe, text_model, texts, tmp_path):
    torch.manual_seed(1)
    base = BertForSequenceClassification.from_pretrained(text_model)
    size = base.num_parameters()
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    words = ["--checkpoints", f"lora={tmp_path / 'adapter'}", "--dataset", str(texts), *CHEAP]
    merged, factors = (
        recipe.main([*words, "--peft", kind, "--output_dir", str(tmp_path / kind)])["checkpoints"]["lora"]
        for kind in ("merged", "factors")
    )
    assert merged["scalars"]["loss"] == pytest.approx(factors["scalars"]["loss"], rel=1e-5)
    assert merged["parameters"] == size > factors["parameters"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoints", "{bert}", "{bert}"], "same name"),
        (["--checkpoints", "{bert}", "--split", "tset"], "split=tset does not exist"),
        (["--checkpoints", "{bert}", "--task", "segmentation"], "task=segmentation is unknown"),
        (["--checkpoints", "{headless}", "--task", "text-classification"], "no trained head"),
        (["--checkpoints", "{three}"], "3 classes, but the data have 2"),
        (["--checkpoints", "{bert}", "--measures", "flatness"], "flatness"),
        (["--checkpoints", "{bert}", "--rho", "-1"], "rho=-1.0 must be"),
        (["--checkpoints", "{bert}", "--num_examples", "0"], "num_examples=0"),
        (["--checkpoints", "{bert}", "--dtype", "bfloat16"], "dtype=bfloat16 is unknown"),
        (["--checkpoints", "/no/such/folder/at/all"], "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(recipe, text_model, texts, tmp_path, words, message):
    folders = {"bert": text_model, "headless": tmp_path / "headless", "three": tmp_path / "three"}
    if "{headless}" in words:
        BertModel(text_config()).save_pretrained(folders["headless"])
    if "{three}" in words:
        BertForSequenceClassification(text_config(num_labels=3)).save_pretrained(folders["three"])
    words = [word.format(**folders) if word.startswith("{") else word for word in words]
    with pytest.raises((recipe.UserError, ValueError), match=message) as caught:
        recipe.main([*words, "--dataset", str(texts), "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value).strip()
