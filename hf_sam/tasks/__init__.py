"""
What the recipes and the `hf-sam` command run.

A module per task, each with a `main(argv)`. Those in `TRAINING` fine-tune a model: they declare the dataclasses that their
command line is parsed into (`ARGUMENTS`) and what they measure (`METRICS`), so that a comparison can read both.
"""

TRAINING = ("image_classification", "text_classification", "causal_lm", "seq2seq", "token_classification")
