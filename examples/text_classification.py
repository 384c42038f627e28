"""Fine-tune MiniLM on film reviews, by ASAM. The ordinary Trainer script; the lines with `SAM` are what changes."""

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer

data = load_dataset("cornell-movie-review-data/rotten_tomatoes")
tokenizer = AutoTokenizer.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
model = AutoModelForSequenceClassification.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", num_labels=2)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = SAMTrainer(
    model=model,
    args=TrainingArguments("minilm-reviews", num_train_epochs=2, learning_rate=1e-4, warmup_steps=0.1),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
    sam_config=SAMConfig(method="asam", rho=0.5),
)
trainer.train()
print(trainer.evaluate())
