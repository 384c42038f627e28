"""
The tasks that the recipes and the `hf-sam` command run.

Each task is a module with a `main(argv)`. Those in `TRAINING` fine-tune a model: they declare the dataclasses of their
command line (`ARGUMENTS`) and the metrics they compute (`METRICS`), which comparisons read.
"""

TRAINING = ("image_classification", "text_classification", "causal_lm", "seq2seq", "token_classification")
