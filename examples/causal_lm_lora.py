"""Fine-tune SmolLM2 on quotations, by LoRA. The ordinary Trainer script; the lines with `SAM` are what changes."""

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer

data = load_dataset("Abirate/english_quotes")["train"].train_test_split(0.1, seed=0)
tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
model = get_peft_model(
    model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
data = data.map(
    lambda rows: tokenizer(rows["quote"], truncation=True, max_length=64),
    batched=True,
    remove_columns=data["train"].column_names,
)

trainer = SAMTrainer(
    model=model,
    args=TrainingArguments("smollm2-quotes", num_train_epochs=1, learning_rate=2e-4, warmup_steps=0.1),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    sam_config=SAMConfig(),
)
trainer.train()
print(trainer.evaluate())
