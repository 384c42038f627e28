"""Fine-tune checkpoints on a second task over a grid of learning rates, and measure forgetting of the first.

    python recipes/forgetting.py adamw=outputs/a sam=outputs/b --recipe text_classification \\
        --config configs/text_classification/minilm.yaml --settings '{"dataset": "second.csv", "max_steps": 200}' \\
        --learning_rates 1e-5 3e-5 1e-4 --seeds 0 1 2
    python recipes/forgetting.py forgetting.yaml          # the same options, in a file

A name given more than once, such as `sam=outputs/b0 sam=outputs/b1`, has several checkpoints. They are replicates,
paired in order with those of the other names. The first task's data are those in the first checkpoint's run record, or
`--first '{"dataset": ...}'`. The result is the first task's test loss at matched training loss of the second task.
Repeat the command to run what is missing.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("forgetting")
