"""Fine-tune an encoder-decoder model with sharpness-aware minimization: summarization, translation, tasks as text.

    accelerate launch recipes/seq2seq.py configs/seq2seq/glue_mrpc.yaml --sam_rho 0.15

For classification, including GLUE and SuperGLUE in the form of T5, the model writes the name of the class. `--sam_rho
0` is the baseline with the same script.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("seq2seq")
