"""The model card: a complete card that replaces the draft of the base trainer, or a section in a custom card."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from transformers.modelcard import TASK_MAPPING

from .config import DEFAULTS, SAMConfig

TAG = "sharpness-aware-minimization"
_BEGIN, _END = "<!-- hf_sam: generated from here -->", "<!-- hf_sam: to here -->"
# Text that identifies a draft by the Trainer, TRL or PEFT, or a card that this module wrote earlier.
_DRAFTS = (
    "has been generated automatically according to the information the Trainer had access to",
    "It has been trained using [TRL]",
    "<!-- Provide a quick summary of what the model is/does. -->",
    _WHOLE := "<!-- hf_sam: the whole card -->",
)
_MAX_CURVE_ROWS = 12
# Names of metrics on the hub, where they differ.
_METRIC_TYPES = {
    "f1_macro": "f1",
    "f1_micro": "f1",
    "mcc": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "brier": "brier_score",
}
# Tasks whose pipelines transformers has removed.
_WITHOUT_PIPELINE = ("summarization", "translation", "text2text-generation")
_NO_METRIC = re.compile(r"_(runtime|per_second|time)$|_(tokens|num_tokens)$")


@dataclass(frozen=True)
class SAMCard:
    """
    The facts of one training run that go on the card.

    Args:
        config (`SAMConfig`): The configuration of the run.
        name (`str`): The name of the model.
        path (`str`): The hub id or folder to load the model from.
        optimizer (`str`): A description of the base optimizer.
        scope (`str`, *optional*): The resolved scope; None before training.
        m (`int`, *optional*): Number of examples per perturbation.
        passes (`float`, *optional*): Passes per step, averaged over the run.
        cost (`float`, *optional*): Measured time of a step relative to one pass.
        task (`str`, *optional*): The pipeline for the model, such as `"image-classification"`.
        datasets (`Sequence[str]`, *optional*): Hub ids, or names of local data.
        metrics (`dict[str, float]`, *optional*): Results of one split, under `<split>_<metric>`.
        is_adapter (`bool`, *optional*, defaults to `False`): Whether a PEFT adapter was saved.
        base (`BaseModel`, *optional*): The fine-tuned model; None for training from scratch.
        architecture (`str`, *optional*): The class of the model.
        curve (`list[dict]`, *optional*): Log entries of the training, each with a `"step"`.
        procedure (`dict`, *optional*): Training settings, by their label on the card.
        phase (`str`, *optional*): The kind of training, such as `"flatten"`, if it is not ordinary fine-tuning.
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
    base: BaseModel | None = None
    architecture: str | None = None
    curve: Sequence[dict[str, Any]] = ()
    procedure: dict[str, Any] = field(default_factory=dict)
    phase: str | None = None

    @classmethod
    def from_trainer(
        cls, trainer: Any, dataset: str | Sequence[str] | None = None, task: str | Sequence[str] | None = None
    ) -> SAMCard:
        """Collect the facts from a trainer; results are the last logged `test_` metrics, else the last `eval_` ones."""
        update = getattr(trainer, "_sam", None)
        args, history = trainer.args, trainer.state.log_history
        path = (getattr(trainer, "hub_model_id", None) or args.output_dir).rstrip("/")
        batch = (args.train_batch_size, args.gradient_accumulation_steps)
        model = trainer.accelerator.unwrap_model(trainer.model)
        return cls(
            config=trainer.sam_config,
            name=path.split("/")[-1],
            path=Path(path).name if Path(path).is_absolute() else path,
            optimizer=f"{args.optim.value}, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}",
            scope=update.scope if update else None,
            m=update.effective_m(*batch) if update else None,
            passes=_last(history, "sam_passes"),
            cost=_last(history, "sam_cost"),
            task=_listed(task)[0] if task else _task_of(model),
            datasets=[Path(name).name if Path(name).exists() else name for name in _listed(dataset)],
            metrics=_last_results(history, "test_") or _last_results(history, "eval_"),
            is_adapter=hasattr(model, "peft_config"),
            base=BaseModel.of(model),
            architecture=type(_without_adapter(model)).__name__,
            curve=[entry for entry in history if "loss" in entry or "eval_loss" in entry],
            procedure=_procedure(args, trainer),
            phase=getattr(trainer, "run_phase", None),
        )

    @property
    def tags(self) -> list[str]:
        """The tags on the hub; none for a run without perturbation."""
        if self.config.rho == 0:
            return []
        return [TAG, f"arxiv:{self._arxiv}"] if self._arxiv else [TAG]

    @property
    def eval_results(self) -> list[EvalResult]:
        """The results as `model-index` metadata; none if the task or dataset is unknown."""
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
        """The section on SAM, between two comments that mark it for later replacement."""
        parts = [self._method(), self._results(), self._curve(), self._usage()]
        return "\n\n".join([_BEGIN, *(part for part in parts if part), _END])

    def whole(self) -> str:
        """The complete card without metadata: introduction, section on SAM, and training procedure."""
        parts = [f"# {self.name}", _WHOLE, self._introduction(), self.text(), self._training()]
        return "\n" + "\n\n".join(part for part in parts if part) + "\n"

    def _introduction(self) -> str:
        kind = "LoRA adapter" if self.is_adapter else "model"
        on = f" on {', '.join(self.datasets)}" if self.datasets else ""
        if self.base is None:
            return f"A {self.architecture or 'model'} trained from scratch{on}."
        if self.phase is not None:
            return (
                f"The finished {kind} {self.base.link} after a {self.phase} phase{on}: a short additional training with "
                f"sharpness-aware minimization, meant to make it more robust to quantization, merging and further fine-tuning."
            )
        return f"A {kind} fine-tuned from {self.base.link}{on}."

    def _curve(self) -> str:
        """Training and evaluation by step, in at most `_MAX_CURVE_ROWS` rows."""
        by_step: dict[int, dict[str, Any]] = {}
        for entry in self.curve:
            by_step.setdefault(entry["step"], {}).update(entry)
        if len(by_step) < 2:
            return ""
        found = list(dict.fromkeys(key for entry in by_step.values() for key in entry))
        columns = [
            name
            for name in found
            if name in ("loss", "sam_sharpness") or (name.startswith("eval_") and not _NO_METRIC.search(name))
        ]
        steps = sorted(by_step)
        stride = -(-len(steps) // _MAX_CURVE_ROWS)
        shown = steps[len(steps) - 1 :: -stride][::-1]
        rows = [
            [str(step)] + [f"{v:.4f}" if isinstance(v := by_step[step].get(c), float) else "" for c in columns]
            for step in shown
        ]
        heads = ["step", *(c.replace("eval_", "validation ").replace("_", " ") for c in columns)]
        heads = ["training loss" if head == "loss" else head for head in heads]
        lines = [" | ".join(cells) for cells in [heads, ["---"] * len(heads), *rows]]
        return "## Training curve\n\n" + "\n".join(f"| {line} |" for line in lines)

    def _training(self) -> str:
        return "## Training procedure\n\n" + _table(self.procedure) if self.procedure else ""

    @property
    def _arxiv(self) -> str | None:
        found = re.search(r"\d{4}\.\d{5}", self.config.paper or "")
        return found and found.group()

    def _method(self) -> str:
        config = self.config
        if config.rho == 0:
            return ""
        rows = {
            "method": f"`{config.name}`: {config.summary}",
            "paper": f"[{config.paper}](https://arxiv.org/abs/{self._arxiv})" if self._arxiv else config.paper,
            "perturbation size rho": f"{config.rho:g}",
            "norm p": f"{config.p:g}" if config.p is not None else None,
            "scope": self.scope or config.scope,
            "examples per perturbation (m)": self.m,
            "passes per step": f"{self.passes:.3g}" if self.passes is not None else None,
            "measured cost of a step": f"{self.cost:.2f} times that of one pass" if self.cost is not None else None,
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
        if self.task in _WITHOUT_PIPELINE:
            classes = ("AutoTokenizer", "AutoModelForSeq2SeqLM")
            lines = [
                f'{name} = {kind}.from_pretrained("{self.path}")'
                for name, kind in zip(("tokenizer", "model"), classes, strict=True)
            ]
            code = "\n".join([f"from transformers import {', '.join(sorted(classes))}", "", *lines])
        return f"## How to load\n\n```python\n{code}\n```{needs if self.is_adapter else ''}"


@dataclass(frozen=True)
class BaseModel:
    """
    The model that was fine-tuned.

    Args:
        name (`str`): The name for readers.
        hub_id (`str`, *optional*): The hub id, if known.
    """

    name: str
    hub_id: str | None = None

    @property
    def link(self) -> str:
        """The name, as a link if the hub id is known."""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"

    @classmethod
    def of(cls, model: Any) -> BaseModel | None:
        """
        The model that `model` was loaded from; None for a model trained from scratch.

        For a local folder, the hub id is taken from its path in the hub's cache, its card or its configuration;
        otherwise the name of the folder is used.
        """
        config = getattr(_without_adapter(model), "config", None)
        name = str(getattr(config, "_name_or_path", "") or "")
        if not name:
            return None
        folder = Path(name).expanduser()
        if not folder.is_dir():
            return cls(name, name) if _HUB_ID.fullmatch(name) else cls(folder.name)
        cached = re.search(r"models--(.+?)--(.+?)/snapshots/", f"{folder.resolve()}/")
        said = f"{cached[1]}/{cached[2]}" if cached else _hub_id_of(folder)
        return cls(said or folder.resolve().name, said)


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def _hub_id_of(folder: Path) -> str | None:
    """The hub id of a model in a local folder, from the title or code of its card, else from its configuration."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    if _BEGIN in text:  # written by this module: the folder is the model itself, whose id is unknown
        return None
    found = re.findall(r"^# +([\w.-]+/[\w.-]+)\s*$", text, re.MULTILINE)
    code = r"(?:from_pretrained|pipeline|SentenceTransformer)\([^)]*?['\"]([\w.-]+/[\w.-]+)['\"]"
    found += [name for name, _ in Counter(re.findall(code, text)).most_common()]
    with contextlib.suppress(OSError, ValueError):
        found.append(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path"))
    return next((name for name in found if name and name.count("/") == 1 and _HUB_ID.fullmatch(name)), None)


def write_model_card(
    trainer: Any, dataset: str | Sequence[str] | None = None, task: str | Sequence[str] | None = None
) -> Path | None:
    """
    Write the model card `README.md` to the trainer's `output_dir`.

    A missing card or a draft of a trainer is replaced by a complete card. A custom card gets a section with the
    settings, results and training curve of SAM. Calling this again updates the section.

    Args:
        trainer (`SAMTrainerMixin`): The trainer, before or after training; unknown facts are left out.
        dataset (`str` or `list[str]`, *optional*): Hub ids or names of the data.
        task (`str` or `list[str]`, *optional*): The pipeline for the model.

    Returns:
        `Path` or None: The file; None on all processes but the first.
    """
    if not trainer.is_world_process_zero():
        return None
    card = SAMCard.from_trainer(trainer, dataset, task)
    path = Path(trainer.args.output_dir) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = ModelCard(path.read_text(encoding="utf-8") if path.exists() else f"---\n{{}}\n---\n\n{_WHOLE}\n")
    whole.data.tags = list(dict.fromkeys([*_listed(whole.data.tags), *card.tags])) or None
    if card.task:
        whole.data.pipeline_tag = card.task
    if card.eval_results:
        whole.data.model_name, whole.data.eval_results = card.name, card.eval_results
    if any(words in whole.text for words in _DRAFTS):
        whole.text = card.whole()
        whole.data.base_model = card.base.hub_id if card.base else None
        if whole.data.get("licence") == "license":  # a placeholder of TRL's draft
            whole.data.pop("licence")
        if whole.data.get("model_name") in (None, "None"):
            whole.data.model_name = card.name
    else:
        whole.text = insert_section(whole.text, card.text())
    whole.save(path)
    return path


def insert_section(text: str, section: str) -> str:
    """Replace the section of an earlier call, or insert it before the training procedure, or at the end."""
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
        found = {
            k: v
            for k, v in entry.items()
            if k.startswith(prefix) and not _NO_METRIC.search(k) and isinstance(v, (int, float))
        }
        if found:
            return found
    return {}


def _task_of(model: Any) -> str | None:
    """The pipeline for a model of this class, from the table of the Trainer's card."""
    base = _without_adapter(model)
    for task, classes in TASK_MAPPING.items():
        if type(base).__name__ in classes.values():
            return task
    return None


def _listed(names: str | Sequence[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _without_adapter(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def _procedure(args: Any, trainer: Any) -> dict[str, Any]:
    """Training settings by their label on the card; unknown ones are left out."""
    state, data = trainer.state, getattr(trainer, "train_dataset", None)
    batch = (
        f"{args.train_batch_size} per device x {_count(args.gradient_accumulation_steps, 'accumulation step')} x "
        f"{_count(args.world_size, 'process', 'processes')}"
    )
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name, False)), None)
    schedule = getattr(args, "lr_scheduler_type", None)
    rows = {
        "training examples": len(data) if hasattr(data, "__len__") else None,
        "optimizer": f"{args.optim.value}, learning rate {args.learning_rate:g}, weight decay {args.weight_decay:g}",
        "schedule": getattr(schedule, "value", schedule),
        "warm-up": getattr(args, "warmup_steps", None) or None,
        "batch": batch,
        "steps": getattr(state, "global_step", None),
        "epochs": f"{state.epoch:.3g}" if getattr(state, "epoch", None) else None,
        "seed": getattr(args, "seed", None),
        "mixed precision": precision,
        "software": ", ".join(
            f"{name} {_version(name)}" for name in ("hf-sam", "transformers", "torch") if _version(name)
        ),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
