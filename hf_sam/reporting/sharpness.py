"""Report sections on measured sharpness: tables, figures and caveats."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import sharpness_plots as plots
from .document import Block, Document, Figure, Listing, Section, Table, Text, write_document
from .formatting import NOTHING
from .plots import figure

FORMAT = "hf_sam.sharpness"
VERSION = 1

CAVEAT = (
    "These are measurements, not a verdict: for fine-tuned transformers, sharpness and generalisation correlate weakly, and "
    "measures disagree (Andriushchenko et al. 2023). Values of different architectures cannot be compared."
)
DESCRIPTIVE = ("loss", "gradient_norm", "weight_norm", "l2")  # shown with sharpness, but not measures of it
# Rows of the table of numbers: key of `scalars`, and its meaning. `*` stands for a number.
LABELS = {
    "loss": "loss",
    "gradient_norm": "norm of the gradient",
    "weight_norm": "norm of the weights",
    "l2": "L2 term, weight decay / 2 times the squared norm",
    "sam": "SAM sharpness, rho = *",
    "sam_adaptive": "adaptive SAM sharpness (eta 0), rho = *",
    "m": "m-sharpness, m = *",
    "worst_l2": "worst case in the ball",
    "worst_linf": "worst case in the box",
    "worst_l2_adaptive": "worst case in the adaptive ball",
    "worst_linf_adaptive": "worst case in the adaptive box",
    "average": "average case, Gaussian noise",
    "average_adaptive": "average case, noise relative to each weight",
    "lambda_1": "largest eigenvalue of the Hessian",
    "lambda_1_over_5": "lambda_1 / lambda_5",
    "lambda_min": "most negative eigenvalue",
    "trace": "trace of the Hessian",
    "gauss_newton_lambda_1": "largest eigenvalue of the Gauss-Newton matrix",
    "gauss_newton_lambda_1_over_5": "its lambda_1 / lambda_5",
    "gauss_newton_trace": "trace of the Gauss-Newton matrix",
}
Record = Mapping[str, Any]  # what `sharpness.json` holds


def write_sharpness_report(record: Record, folder: Path, command: str | None = None) -> Path:
    """Write `report.html`, `report.md`, `figures/` and `data/` into `folder`; return the path of `report.html`."""
    names, subset = ", ".join(record["checkpoints"]), record["subset"]
    lead = f"{names}, on {subset['examples']} examples of the {subset['split']} split of {subset['dataset']}."
    sections = sharpness_sections(record)
    if command:
        sections.insert(
            1, Section("What to do next", [Text("This command repeats all measurements:"), Text(command, "command")])
        )
    return write_document(Document("Sharpness", lead, sections, numbers=record), folder)


def sharpness_sections(record: Record) -> list[Section]:
    """Build two sections from the content of `sharpness.json`: the results, and (folded) how they were measured."""
    found = [Text(_headline(record), "verdict"), Text(CAVEAT), *_warnings(record), *_figures(record), _numbers(record)]
    return [
        Section("Sharpness", found),
        Section("How sharpness was measured", [*_setup(record), _cost(record)], folded=True),
    ]


def _headline(record: Record) -> str:
    """State the first measure of sharpness of every checkpoint, without a verdict."""
    checkpoints = record["checkpoints"]
    keys = list(dict.fromkeys(key for entry in checkpoints.values() for key in entry["scalars"]))
    key = next((key for key in keys if key not in DESCRIPTIVE), next(iter(keys), None))
    if key is None:
        return "Nothing was measured."
    listed = ", ".join(f"{name} {_cell(entry, key)}" for name, entry in checkpoints.items())
    return f"{label_of(key)[0].upper()}{label_of(key)[1:]}: {listed}."


def _warnings(record: Record) -> Iterator[Block]:
    if len({entry["fingerprint"] for entry in record["checkpoints"].values()}) > 1:
        yield Text(
            "The checkpoints preprocess the examples differently, so they were not measured on the same inputs.",
            "warning",
        )


def _setup(record: Record) -> Iterator[Block]:
    config, subset = record["config"], record["subset"]
    taken = {measure for entry in record["checkpoints"].values() for measure in entry["measures"]}
    items = [
        f"Loss: the model's own, in evaluation mode, over {subset['labels']} labels of {subset['examples']} examples "
        f"of the {subset['split']} split; subset {subset['fingerprint']}.",
        f"Parameters: {record['perturb']}; arithmetic in {record['dtype']}.",
    ]
    if balls := taken & {"m", "worst"}:
        names = (
            "m-sharpness and worst case" if len(balls) == 2 else {"m": "m-sharpness", "worst": "Worst case"}[min(balls)]
        )
        item = f"{names}: radius {config['radius']:g}, adaptive {config['adaptive_radius']:g} in units of the weights"
        if "worst" in taken:
            item += (
                f"; boxes have the half side radius / sqrt(P). The worst case is found by {config['steps']} steps of projected ascent, "
                "so it is a lower bound"
            )
        items.append(f"{item}.")
    if "average" in taken:
        items.append(
            f"Average case: {config['draws']} pairs of opposite draws, standard deviation {config['sigma']:g} per weight, "
            f"or {config['adaptive_sigma']:g} of each weight. ± is the standard error of the estimate."
        )
    if taken & {"hessian", "gauss_newton"}:
        items.append(
            f"Eigenvalues to a relative {config['tolerance']:g}; traces from {config['probes']} sign vectors, ± the "
            f"standard error of the estimate."
        )
    yield Listing(items)


def _numbers(record: Record) -> Table:
    checkpoints = record["checkpoints"]
    keys = dict.fromkeys(key for entry in checkpoints.values() for key in entry["scalars"])
    rows = [[label_of(key), *(_cell(entry, key) for entry in checkpoints.values())] for key in keys]
    size = ["parameters P", *(f"{entry['parameters']:,}" for entry in checkpoints.values())]
    return Table(["measure", *checkpoints], [size, *rows], "Rise of the loss unless stated otherwise", stacked=True)


def label_of(key: str) -> str:
    """Return the label of a key of `scalars`; an unknown key is returned unchanged."""
    if key in LABELS:
        return LABELS[key]
    name, _, number = key.rpartition("_")
    return LABELS[name].replace("*", number) if name in LABELS else key


def _cell(entry: Record, key: str) -> str:
    if entry["scalars"].get(key) is None:  # not measured, or not finite
        return NOTHING
    error, measures = None, entry["measures"]
    if key in ("average", "average_adaptive"):
        error = measures["average"]["plain" if key == "average" else "adaptive"]["standard_error"]
    elif key in ("trace", "gauss_newton_trace"):
        error = measures["hessian" if key == "trace" else "gauss_newton"]["trace"]["standard_error"]
    text = f"{entry['scalars'][key]:.4g}"
    if "lambda_1" in key and not measures["gauss_newton" if "gauss" in key else "hessian"]["converged"]:
        text += " (not all converged)"
    return text if error is None else f"{text} ± {error:.2g}"


def _figures(record: Record) -> Iterator[Figure]:
    found = {
        measure: {n: e["measures"][measure] for n, e in record["checkpoints"].items() if measure in e["measures"]}
        for measure in ("sam", "hessian", "density", "slice_1d", "slice_2d")
    }
    if found["sam"]:
        caption = "Rise of the loss at SAM's own perturbation, against its size rho."
        yield figure("sharpness-rho", caption, plots.draw_rho, found["sam"])
    if found["density"]:
        eigenvalues = {name: result["eigenvalues"] for name, result in found["hessian"].items()}
        caption = (
            "Spectral density of the Hessian by stochastic Lanczos quadrature; ticks at the bottom are the largest "
            "eigenvalues, computed separately."
        )
        yield figure("hessian-spectrum", caption, plots.draw_spectra, found["density"], eigenvalues)
    if found["slice_1d"]:
        caption = "The loss along random filter-normalised directions."
        yield figure("slices", caption, plots.draw_slices, found["slice_1d"])
    if found["slice_2d"]:
        caption = "The loss in the plane of two random filter-normalised directions."
        yield figure("planes", caption, plots.draw_planes, found["slice_2d"])
    if record["lines"]:
        caption = "The loss between checkpoints; the barrier is its largest rise above the chord."
        yield figure("lines", caption, plots.draw_lines, record["lines"])


def _cost(record: Record) -> Table:
    rows = []
    for name, entry in record["checkpoints"].items():
        for measure, result in entry["measures"].items():
            passes = result["passes"]
            epochs = result["seconds"] / entry["epoch_seconds"]
            counts = (f"{passes[kind]:g}" for kind in ("forward", "gradient", "curvature"))
            rows.append([name, measure, f"{result['seconds']:.1f}", f"{epochs:.2f}", *counts])
    peaks = "; ".join(
        f"{name}: {entry['peak_memory'] / 2**30:.2f} GiB, after the first gradient "
        f"{entry['gradient_memory'] / 2**30:.2f} GiB"
        for name, entry in itertools.islice(record["checkpoints"].items(), 1)
    )
    return Table(
        ["checkpoint", "measure", "seconds", "epochs", "forward", "gradient", "curvature"],
        rows,
        f"Cost. An epoch is the time for the gradients of {record['subset']['epoch_examples']} training examples on the "
        f"same machine. Passes are over the subset; a curvature pass is one matrix-vector product. Peak memory of the "
        f"process: {peaks}",
        2,
    )
