"""What the model card says about sharpness-aware minimization, beside what the base trainer's card says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers.modelcard import TASK_MAPPING

from .config import DEFAULTS, SAMConfig

TAG = "sharpness-aware-minimization"
_BEGIN, _END = "<!-- hf_sam: generated from here -->", "<!-- hf_sam: to here -->"
# What the Trainer's card says of a model that comes from no checkpoint.
_NAMELESS = "is a fine-tuned version of [](https://huggingface.co/) on"
# The hub's own names of metrics that have one.
_METRIC_TYPES = {
    "f1_macro": "f1",
    "f1_micro": "f1",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "brier": "brier_score",
}
_NO_METRIC = re.compile(r"_(runtime|per_second|time)$|_(tokens|num_tokens)$")


@dataclass(frozen=True)
class SAMCard:
    """
    The facts of one training run that go on the card.

    Args:
        config (`SAMConfig`): What was done.
        name (`str`): Of the model, as the card calls it.
        path (`str`): Where it loads from: the hub id, or the folder.
        optimizer (`str`): The base optimizer in words.
        scope (`str`, *optional*): As it was resolved; None where training has not begun.
        m (`int`, *optional*): Examples over which one perturbation was computed.
        passes (`float`, *optional*): Gradient evaluations a step, averaged over the run.
        cost (`float`, *optional*): Measured time of a step in units of one pass.
        task (`str`, *optional*): The pipeline that loads the model, such as `"image-classification"`.
        datasets (`Sequence[str]`, *optional*): Hub ids, or names of local data.
        metrics (`dict[str, float]`, *optional*): Results, named `<split>_<metric>`, all of one split.
        is_adapter (`bool`, *optional*, defaults to `False`): Whether what was saved is a PEFT adapter.
    """

    config: SAMConfig
    name: str
    path: str
    optimizer: str
    scope: str | None = None
    m: int | None = None
    passes: float | None = None
    cost: float | None = None
    task: str | None = None
    datasets: Sequence[str] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    is_adapter: bool = False

    @classmethod
    def from_trainer(
        cls, trainer: Any, dataset: str | Sequence[str] | None = None, task: str | Sequence[str] | None = None
    ) -> SAMCard:
        """Read the facts off a trainer; results are the last logged `test_` metrics, else the last `eval_` ones."""
        update = getattr(trainer, "_sam", None)
        args, history = trainer.args, trainer.state.log_history
        path = (getattr(trainer, "hub_model_id", None) or args.output_dir).rstrip("/")
        batch = (args.train_batch_size, args.gradient_accumulation_steps, args.world_size)
        return cls(
            config=trainer.sam_config,
            name=path.split("/")[-1],
            path=path,
            optimizer=f"{args.optim.value}, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}",
            scope=update.scope if update else None,
            m=update.effective_m(*batch) if update else None,
            passes=_last(history, "sam_passes"),
            cost=_last(history, "sam_cost"),
            task=_listed(task)[0] if task else _task_of(trainer.accelerator.unwrap_model(trainer.model)),
            datasets=[Path(name).name if Path(name).exists() else name for name in _listed(dataset)],
            metrics=_last_results(history, "test_") or _last_results(history, "eval_"),
            is_adapter=hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"),
        )

    @property
    def tags(self) -> list[str]:
        """What the hub finds the model by; none for a run without perturbation."""
        if self.config.rho == 0:
            return []
        return [TAG, f"arxiv:{self._arxiv}"] if self._arxiv else [TAG]

    @property
    def eval_results(self) -> list[EvalResult]:
        """The results as `model-index` metadata; none where the task or the data have no name."""
        if not (self.task and self.datasets):
            return []
        return [
            EvalResult(
                task_type=self.task,
                dataset_type=self.datasets[0],
                dataset_name=self.datasets[0],
                dataset_split=name.split("_")[0],
                metric_type=_METRIC_TYPES.get(metric, metric),
                metric_name=metric,
                metric_value=value,
            )
            for name, value in self.metrics.items()
            for metric in [name.split("_", 1)[1]]
        ]

    def text(self) -> str:
        """The card's own section, between two comments by which a later one replaces it."""
        parts = [self._method(), self._results(), self._usage()]
        return "\n\n".join([_BEGIN, *(part for part in parts if part), _END])

    @property
    def _arxiv(self) -> str | None:
        found = re.search(r"\d{4}\.\d{5}", self.config.row.paper)
        return found and found.group()

    def _method(self) -> str:
        config = self.config
        if config.rho == 0:
            return ""
        rows = {
            "method": f"`{config.method}`: {config.row.summary}",
            "paper": f"[{config.row.paper}](https://arxiv.org/abs/{self._arxiv})" if self._arxiv else config.row.paper,
            "perturbation size rho": f"{config.rho:g}",
            "norm p": f"{config.p:g}" if config.p is not None else None,
            "scope": self.scope or config.scope,
            "examples a perturbation (m)": self.m,
            "passes a step": f"{self.passes:.3g}" if self.passes is not None else None,
            "measured cost of a step": f"{self.cost:.2f} x one pass" if self.cost is not None else None,
            "base optimizer": self.optimizer,
            **{
                f"`{name}`": f"`{value}`"
                for name, value in config.to_dict().items()
                if name not in ("method", "rho", "p", "scope", "m") and value != DEFAULTS.get(name)
            },
        }
        return "## Sharpness-aware minimization\n\n" + _table({k: v for k, v in rows.items() if v is not None})

    def _results(self) -> str:
        if not self.metrics:
            return ""
        split = next(iter(self.metrics)).split("_")[0]
        on = f" of {', '.join(self.datasets)}" if self.datasets else ""
        rows = {name.split("_", 1)[1]: f"{value:.4f}" for name, value in self.metrics.items()}
        return f"## Results\n\nOn the {split} split{on}:\n\n" + _table(rows)

    def _usage(self) -> str:
        if not self.task:
            return ""
        needs = "\n\nThe folder holds a PEFT adapter: `pip install peft`; its base model is loaded with it."
        code = f'from transformers import pipeline\n\nmodel = pipeline("{self.task}", model="{self.path}")'
        return f"## How to load\n\n```python\n{code}\n```{needs if self.is_adapter else ''}"


def write_model_card(
    trainer: Any, dataset: str | Sequence[str] | None = None, task: str | Sequence[str] | None = None
) -> Path | None:
    """
    Put SAM's section, tags and results into the `README.md` that the trainer has written in its `output_dir`, or begin
    one. Writing twice changes nothing.

    Args:
        trainer (`SAMTrainerMixin`): At any time; what is not known yet is left out.
        dataset (`str` or `list[str]`, *optional*): Hub ids, or names, of the data.
        task (`str` or `list[str]`, *optional*): The pipeline that loads the model.

    Returns:
        The file, or None on every process but the first.
    """
    if not trainer.is_world_process_zero():
        return None
    card = SAMCard.from_trainer(trainer, dataset, task)
    path = Path(trainer.args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = ModelCard(path.read_text(encoding="utf-8") if path.exists() else f"---\n{{}}\n---\n\n# {card.name}\n")
    whole.data.tags = list(dict.fromkeys([*(whole.data.tags or []), *card.tags])) or None
    if card.task:
        whole.data.pipeline_tag = card.task
    if card.eval_results:
        whole.data.model_name, whole.data.eval_results = card.name, card.eval_results
    whole.text = insert_section(whole.text.replace(_NAMELESS, "was trained from scratch on"), card.text())
    whole.save(path)
    return path


def insert_section(text: str, section: str) -> str:
    """Replace the section that an earlier call inserted, else put it before the training procedure, else at the end."""
    if _BEGIN in text and _END in text:
        head, rest = text.split(_BEGIN, 1)
        return head + section + rest.split(_END, 1)[1]
    before, heading, after = text.partition("\n## Training procedure")
    return f"{before.rstrip()}\n\n{section}\n{heading}{after}"


def _table(rows: dict[str, Any]) -> str:
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {line} |" for line in lines)])


def _last(history: list[dict[str, Any]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)


def _last_results(history: list[dict[str, Any]], prefix: str) -> dict[str, float]:
    for entry in reversed(history):
        found = {k: v for k, v in entry.items() if k.startswith(prefix) and not _NO_METRIC.search(k)}
        if found:
            return found
    return {}


def _task_of(model: Any) -> str | None:
    """The pipeline for a model of this class, by the table that the Trainer's own card uses."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for task, classes in TASK_MAPPING.items():
        if type(base).__name__ in classes.values():
            return task
    return None


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
