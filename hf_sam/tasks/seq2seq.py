"""Fine-tune an encoder-decoder model with sharpness-aware minimization: summarization, translation, tasks as text.

    hf-sam seq2seq glue_mrpc --sam_rho 0.15

Sources and targets are texts. Classes are words that the model generates; `--glue_task` formats GLUE and SuperGLUE
tasks as T5 does. Evaluation generates text. `--sam_rho 0` is the baseline with the same configuration.
"""
# ruff: noqa: RUF009 - `option` returns a dataclass field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from hf_sam import SAMTrainerMixin

from . import text_metrics
from .command_line.arguments import SAMArguments, parse_arguments
from .command_line.errors import UserError, as_user_error
from .command_line.options import DataArguments, ModelArguments, RunArguments, option
from .data.labels import add_label_noise, check_classes, class_labels, numeric_labels
from .data.loading import Splits, column_names, load_splits, make_splits, pick_column, public_name
from .data.summary import classes, sizes, tell, truncation
from .data.text_to_text import (
    CLASSIFICATION,
    LABEL,
    NAMED_TASKS,
    REGRESSION,
    SOURCE,
    SUMMARIZATION,
    TARGET,
    TEXT,
    TRANSLATION,
    as_text,
    language_pair,
    rounded_number,
    split_translations,
    tokenize_pairs,
    with_end,
)
from .data.texts import check_texts
from .metrics import hub_metrics
from .models import check_max_length, load_config, load_model, load_tokenizer
from .per_token import GenerationWithLikelihood, LossPerToken
from .running import check_training_arguments, finish, prepare, recorded, save, train, write_card

# The kinds of targets, and the metrics of each on the test split.
EVALUATION: dict[str, tuple[str, ...]] = {
    CLASSIFICATION: text_metrics.ANSWERS,
    REGRESSION: text_metrics.NUMBERS,
    SUMMARIZATION: text_metrics.SUMMARIES,
    TRANSLATION: text_metrics.TRANSLATIONS,
    TEXT: text_metrics.TEXTS,
}
METRICS = tuple(dict.fromkeys(name for names in EVALUATION.values() for name in names))
SOURCES = ("text", "source", "document", "dialogue", "article", "question", "input", "sentence")
SUMMARIES, TARGETS = ("summary", "highlights"), ("target", "answer", "output")
LABELS = ("label", "labels", "class")


@dataclass
class Seq2SeqArguments:
    """The sources and targets, and how classes become text."""

    glue_task: str | None = option(None, f"A GLUE or SuperGLUE task in the form of T5: {', '.join(NAMED_TASKS)}.")
    problem_type: str | None = option(None, f"{', '.join(EVALUATION)}; default: detected from the columns.")
    text_column: str | None = option(None, "Column of the sources; default: detected.")
    text_pair_column: str | None = option(None, "Column of a second text in the source.")
    target_column: str | None = option(None, "Column of the targets, if they are texts; default: detected.")
    source_prefix: str = option("", "Prefix of every source, such as 'summarize: '.")
    label_words: list[str] | None = option(None, "Words for the classes, in order; default: their names.")
    source_lang: str | None = option(None, "Language of the sources in a column of translations, such as en.")
    target_lang: str | None = option(None, "Language of the targets in a column of translations, such as fr.")
    max_length: int = option(512, "Maximum number of tokens of a source; the rest is cut off.")
    max_target_length: int = option(128, "Maximum number of tokens of a target; also the default limit of generation.")
    drop_empty: bool = option(False, "Drop examples without text; otherwise they are an error.")

    def __post_init__(self):
        if self.glue_task is not None and self.glue_task not in NAMED_TASKS:
            raise ValueError(f"glue_task={self.glue_task} is unknown. Allowed: {', '.join(NAMED_TASKS)}.")
        if self.problem_type is not None and self.problem_type not in EVALUATION:
            raise ValueError(f"problem_type={self.problem_type} is unknown. Allowed: {', '.join(EVALUATION)}.")
        if self.max_target_length < 2:
            raise ValueError(
                f"max_target_length={self.max_target_length} must be at least 2, for one token and the end-of-sequence token."
            )
        if self.glue_task is not None:
            for name in ("problem_type", "target_column", "source_lang", "target_lang"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is set by glue_task={self.glue_task}; leave it out.")


@dataclass
class GenerationArguments(Seq2SeqTrainingArguments):
    __doc__ = Seq2SeqTrainingArguments.__doc__  # --help reads the descriptions of the arguments from it

    predict_with_generate: bool = option(
        True, "Generate text in evaluation; otherwise only the likelihood is measured."
    )


class SAMSeq2SeqTrainer(LossPerToken, GenerationWithLikelihood, SAMTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` of transformers with the sharpness-aware update."""


ARGUMENTS = (ModelArguments, DataArguments, Seq2SeqArguments, RunArguments, SAMArguments, GenerationArguments)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> SAMSeq2SeqTrainer:
    """
    Train, evaluate and save.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer.
    """
    model_args, data_args, text_args, run_args, sam_args, args = parse_arguments(ARGUMENTS, argv)
    sam_config = prepare(args, run_args, sam_args, model_args)

    with args.main_process_first(desc="reading the data"):
        splits, problem_type, words = read_data(data_args, text_args)
    check_training_arguments(args, data_args, run_args, "validation" in splits, EVALUATION[problem_type])

    tokenizer = load_tokenizer(model_args)
    config = sequence_config(model_args, tokenizer)
    check_max_length(text_args.max_length, config)
    check_max_length(text_args.max_target_length, config, "max_target_length")
    answers = check_words(words, tokenizer, text_args) if words else None
    if problem_type == REGRESSION:
        check_numbers(splits, tokenizer, text_args.max_target_length)
    if args.process_index == 0:
        counted = classes(splits, LABEL, words) if words else []
        cut = [
            *truncation(splits, [SOURCE], tokenizer, text_args.max_length),
            *truncation(splits, [TARGET], tokenizer, text_args.max_target_length, "max_target_length"),
        ]
        tell([*sizes(splits), *counted, *cut])
    model = load_model(AutoModelForSeq2SeqLM, model_args, config)
    if args.generation_config is not None:
        with as_user_error(ValueError, OSError, prefix=f"generation_config={args.generation_config}: "):
            Seq2SeqTrainer.load_generation_config(args.generation_config)
    elif args.generation_max_length is None:
        args.generation_max_length = text_args.max_target_length + 1  # the decoder start token counts

    with args.main_process_first(desc="tokenizing"):
        tokens = tokenize_pairs(splits, tokenizer, text_args.max_length, text_args.max_target_length)
    tokens["train_split"] = tokens["train"]
    if data_args.streaming:
        tokens["train"] = tokens["train"].shuffle(seed=args.seed, buffer_size=data_args.shuffle_buffer)
    kind = {"problem_type": problem_type, "tokenizer": tokenizer, "answers": answers}
    trainer = SAMSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=tokens["train"],
        eval_dataset=tokens.get("validation"),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        compute_metrics=partial(text_metrics.generation_metrics, hub=hub_metrics(run_args.hub_metrics), **kind),
        sam_config=sam_config,
    )
    with recorded(trainer, splits, data_args, run_args, model=model_args, texts=text_args) as record:
        train(trainer)
        finish(trainer, record, tokens, run_args, partial(text_metrics.generation_table, **kind))
    save(trainer)
    task = problem_type if problem_type in (SUMMARIZATION, TRANSLATION) else "text2text-generation"
    write_card(trainer, dataset=[public_name(data_args)], tasks=[task])
    return trainer


def read_data(data_args: DataArguments, text_args: Seq2SeqArguments) -> tuple[Splits, str, list[str] | None]:
    """Read the splits as sources and targets, the kind of targets, and the words for the classes."""
    named = NAMED_TASKS.get(text_args.glue_task)
    if named is not None:
        if data_args.dataset is None:
            data_args.dataset, data_args.dataset_config = named.hub_id, text_args.glue_task
        data_args.test_split = data_args.test_split or named.test_split
    splits = load_splits(data_args)
    names = column_names(splits["train"])
    target = text_args.target_column
    if "translation" in names and target is None and named is None and data_args.label_column is None:
        languages = language_pair(splits, "translation", text_args.source_lang, text_args.target_lang)
        splits = split_translations(splits, "translation", languages)
        problem_type, target = text_args.problem_type or TRANSLATION, TARGET
    else:
        problem_type = text_args.problem_type or find_problem_type(names, data_args, text_args)
    check_arguments(problem_type, data_args, text_args)
    columns = list(named.columns) if named else source_columns(splits, text_args)
    for name in columns:
        pick_column(splits, name, (), "text_column")
    splits = check_texts(splits, columns, text_args.drop_empty)
    prefix = f"{text_args.glue_task} " if named else text_args.source_prefix
    write = partial(as_text, columns=columns, prefix=prefix, is_labelled=named is not None or len(columns) > 1)
    if problem_type == CLASSIFICATION:
        label = pick_column(splits, data_args.label_column, LABELS, "label_column", taken=columns)
        splits, words = read_classes(splits, label, data_args, text_args)
        return write(splits, target=lambda row: words[row[label]], label_column=label), problem_type, words
    if problem_type == REGRESSION:
        label = pick_column(splits, data_args.label_column, (*LABELS, "score"), "label_column", taken=columns)
        splits = make_splits(numeric_labels(splits, label), data_args, strata=None)
        return write(splits, target=lambda row: rounded_number(row[label])), problem_type, None
    target = pick_column(splits, target, (*SUMMARIES, *TARGETS), "target_column", taken=columns)
    splits = make_splits(check_texts(splits, [target], text_args.drop_empty), data_args, strata=None)
    return write(splits, target=lambda row: row[target]), problem_type, None


def read_classes(
    splits: Splits, label: str, data_args: DataArguments, text_args: Seq2SeqArguments
) -> tuple[Splits, list[str]]:
    """
    Convert the labels to class indices in all splits, and return the word for each class.

    Raises:
        UserError: If the labels are not classes, or the number of words differs from that of the classes.
    """
    splits, names = class_labels(splits, label, data_args)
    words = text_args.label_words or names
    if text_args.glue_task and not text_args.label_words:
        usual = list(NAMED_TASKS[text_args.glue_task].words)
        words = names if set(names) == set(usual) else usual  # a copy may number the classes differently
    if len(words) != len(names):
        argument = "label_words" if text_args.label_words else f"glue_task={text_args.glue_task}"
        raise UserError(
            f"{argument} has {len(words)} words ({', '.join(words)}), but {label} has {len(names)} classes: "
            f"{', '.join(names)}; give one word per class."
        )
    splits = make_splits(splits, data_args, strata=label)
    check_classes(splits, label, names)
    return add_label_noise(splits, label, len(names), data_args), words


def find_problem_type(names: Sequence[str], data_args: DataArguments, text_args: Seq2SeqArguments) -> str:
    """
    Detect the kind of targets from the arguments given, otherwise from common column names.

    Raises:
        UserError: If neither identifies it.
    """
    if text_args.glue_task is not None:
        return CLASSIFICATION if NAMED_TASKS[text_args.glue_task].words else REGRESSION
    if data_args.label_column or text_args.label_words or data_args.class_names:
        return CLASSIFICATION
    found = text_args.target_column or next((name for name in (*SUMMARIES, *TARGETS, *LABELS) if name in names), None)
    if found is None:
        raise UserError(
            f"No column found for the targets. The data set has: {', '.join(names)}. Give --target_column for texts, or "
            "--label_column for classes."
        )
    return SUMMARIZATION if found in SUMMARIES else CLASSIFICATION if found in LABELS else TEXT


def check_arguments(problem_type: str, data_args: DataArguments, text_args: Seq2SeqArguments) -> None:
    """
    Check that the arguments fit the kind of targets.

    Raises:
        UserError: If an argument does not apply to this kind of targets.
    """
    wrong: list[tuple[Any, str]] = []
    if problem_type != CLASSIFICATION:
        wrong += [(data_args, name) for name in ("label_noise", "train_samples_per_class", "class_names")]
        wrong += [(text_args, "label_words")]
    if problem_type == REGRESSION:
        wrong += [(data_args, "streaming"), (text_args, "target_column")]
    elif problem_type == CLASSIFICATION:
        wrong += [(text_args, "target_column")]
    else:
        wrong += [(data_args, "label_column")]
    for arguments, name in wrong:
        if getattr(arguments, name):
            raise UserError(f"{name} does not apply to problem_type={problem_type}; leave it out.")


def source_columns(splits: Splits, text_args: Seq2SeqArguments) -> list[str]:
    """Return the one or two columns of the source."""
    first = pick_column(splits, text_args.text_column, SOURCES, "text_column")
    if text_args.text_pair_column is None:
        return [first]
    return [first, pick_column(splits, text_args.text_pair_column, (), "text_pair_column")]


def sequence_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """
    Load the model's configuration. A model from scratch gets the tokenizer's special tokens, and decoding starts from
    the padding token as in T5.

    Raises:
        UserError: If the tokenizer has no end-of-sequence or no padding token.
    """
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"The tokenizer has no {name}, which sequence-to-sequence models need; choose another one.")
    own: dict[str, Any] = {}
    if model_args.model_type is not None:
        own = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        layers = model_args.config_overrides.get("num_layers")
        if layers is not None and model_args.model_type in ("t5", "mt5", "umt5"):
            own["num_decoder_layers"] = layers  # the default of these configurations: as many as the encoder has
    config = load_config(model_args, **own)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = tokenizer.pad_token_id
    return config


def check_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, text_args: Seq2SeqArguments) -> list[str]:
    """
    Return each word as it is decoded from the model's output.

    Raises:
        UserError: If two words decode to the same text, or a word is longer than `max_target_length`.
    """
    answers = text_metrics.class_answers(words, tokenizer)
    for word, tokens in zip(words, tokenizer(text_target=list(words))["input_ids"], strict=True):
        needed = len(tokens) + (tokens[-1] != tokenizer.eos_token_id)
        if needed > text_args.max_target_length:
            raise UserError(
                f"max_target_length={text_args.max_target_length} cuts the word {word!r}, which has {needed} tokens "
                f"including end of sequence; give at least {needed}."
            )
    return answers


def check_numbers(splits: Splits, tokenizer: PreTrainedTokenizerBase, max_target_length: int) -> None:
    """
    Check that the tokenizer reproduces every number in the training split.

    Raises:
        UserError: If it does not.
    """
    texts = sorted(set(splits["train"][TARGET]))
    tokens = tokenizer(text_target=texts, truncation=True, max_length=max_target_length)["input_ids"]
    written = text_metrics.decoded(
        text_metrics.padded([with_end(row, tokenizer, max_target_length) for row in tokens]), tokenizer
    )
    for text, number in zip(texts, text_metrics.numbers_in(written), strict=True):
        if number != float(text):
            raise UserError(
                f"The tokenizer does not reproduce {text!r} within max_target_length={max_target_length}; choose another model, or "
                "use text_classification, which does regression."
            )
