"""Fine-tune MiniLM on film reviews by a method of your own: a class of one line of mathematics."""

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from hf_sam import Ascent, SAMConfig, SAMTrainer


class LossBudget(Ascent):
    """The radius at which the linearised loss rises by 0.05, at most rho (after LE-SAM, arXiv 2605.10183)."""

    def eps(self, g, step):
        return g * ((0.05 / g.norm()).clamp(max=step.rho) / g.norm())


data = load_dataset("cornell-movie-review-data/rotten_tomatoes")
tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
model = AutoModelForSequenceClassification.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=2)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)

trainer = SAMTrainer(
    model=model,
    args=TrainingArguments("minilm-loss-budget", num_train_epochs=1, learning_rate=1e-4, warmup_steps=0.1),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    sam_config=SAMConfig(ascent=LossBudget(), rho=0.1),
)
trainer.train()
print(trainer.evaluate())
