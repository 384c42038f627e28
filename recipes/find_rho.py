"""Find a rho for your model and data at the cost of one or two ordinary runs, or learn that SAM does not help there.

    python recipes/find_rho.py image_classification configs/image_classification/digits.yaml --label_noise 0.4

First the recipe, then its command line as ever, with the options of the search anywhere among it. The same command goes
on after an interruption. docs/find_rho.md says how it searches, by which rule it recommends, and what it cannot see.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("find_rho")
