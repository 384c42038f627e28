from pathlib import Path

from huggingface_hub import ModelCard
from integration import tiny

from hf_sam import SAMConfig
from hf_sam.model_card import write_model_card


def test_the_trainers_card_has_the_section_and_the_tag_and_writing_twice_changes_nothing(tmp_path):
    trainer = tiny.trained(tiny.vit(0.0), tiny.images(), tmp_path, SAMConfig(method="asam", rho=0.3))
    trainer.create_model_card(dataset="digits", tasks="image-classification", tags=["vision"])
    text = Path(tmp_path, "README.md").read_text()
    card = ModelCard(text)
    assert {"sharpness-aware-minimization", "arxiv:2102.11600", "vision"} <= set(card.data.tags)
    assert "sam" not in card.data.tags  # which means Segment Anything
    assert "## Sharpness-aware minimization" in text
    assert "| perturbation size rho | 0.3 |" in text
    assert "| passes per step | 2 |" in text
    trainer.create_model_card(dataset="digits", tasks="image-classification", tags=["vision"])
    assert Path(tmp_path, "README.md").read_text() == text


def test_a_run_without_perturbation_is_not_tagged(tmp_path):
    trainer = tiny.trained(tiny.vit(0.0), tiny.images(), tmp_path, SAMConfig(rho=0))
    trainer.create_model_card()
    assert "sharpness-aware-minimization" not in (ModelCard.load(Path(tmp_path, "README.md")).data.tags or [])


def test_a_custom_card_may_have_one_tag_and_a_metric_that_is_not_a_number(tmp_path):
    trainer = tiny.trained(tiny.vit(0.0), tiny.images(), tmp_path, SAMConfig(rho=0.1))
    trainer.state.log_history.append({"step": 1, "test_accuracy": 0.5, "test_counts": [1, 2], "test_f1": None})
    path = Path(tmp_path, "README.md")
    path.write_text("---\ntags: vision\n---\n# Mine")
    write_model_card(trainer)
    text = path.read_text()
    assert ModelCard(text).data.tags == ["vision", "sharpness-aware-minimization", "arxiv:2010.01412"]
    assert "# Mine" in text
    assert "| accuracy | 0.5000 |" in text
    assert "counts" not in text
