"""Data of causal language models, and a perplexity that weights all tokens equally."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ..command_line.errors import UserError
from .loading import Splits, column_names, pick_column
from .summary import rows_in_words
from .texts import check_texts

# Columns of examples that are not plain text, with the names TRL uses.
CONVERSATION, COMPLETION = ("messages",), ("prompt", "completion")


class TokenWeightedEvaluation:
    """
    Mixin that replaces a trainer's predictions by the summed negative log-likelihood of each sequence, and its labels by
    the number of tokens predicted in it. Logits are thus never gathered, and perplexity weights all tokens equally.
    """

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        sums, counts = sequence_nll(logits, labels, inputs.get("position_ids"))
        loss = sums.sum() / counts.sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, sums, counts)


def sequence_nll(logits: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """
    Compute the negative log-likelihood of each sequence.

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, vocabulary)`): Output of a causal language model.
        labels (`torch.Tensor` of shape `(batch, tokens)`): -100 at positions without a loss.
        position_ids (`torch.Tensor` of shape `(1, tokens)`, *optional*):
            Needed if several sequences share one row without padding; each 0 starts a sequence.

    Returns:
        Sums in nats and numbers of predicted tokens, both `(sequences,)`.
    """
    targets = labels[:, 1:]
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    counted = (targets != -100).long()
    if position_ids is None or len(labels) > 1:
        return losses.sum(dim=1), counted.sum(dim=1)
    sequence = (position_ids == 0).cumsum(dim=1).squeeze(0) - 1  # (tokens,)
    number = int(sequence[-1]) + 1
    sums = losses.new_zeros(number).index_add_(0, sequence[1:], losses.squeeze(0))
    return sums, counted.new_zeros(number).index_add_(0, sequence[1:], counted.squeeze(0))


def pick_format(splits: Splits, text_column: str | None, drop_empty: bool) -> tuple[Splits, tuple[str, ...]]:
    """
    Find the columns that make up an example, and keep only these in the splits.

    Raises:
        UserError: If there are no such columns, or an example is empty.
    """
    names = column_names(splits["train"])
    formats = [columns for columns in (CONVERSATION, COMPLETION) if set(columns) <= set(names)]
    if formats and text_column is None:
        found = formats[0]
    else:
        found = (pick_column(splits, text_column, ("text", "content", "sentence"), "text_column"),)
    for name in found:
        pick_column(splits, name, (), "text_column")
    if found == CONVERSATION:
        for split, dataset in splits.items():
            empty = (
                [i for i, turns in enumerate(dataset["messages"]) if not turns] if isinstance(dataset, Dataset) else []
            )
            if empty:
                raise UserError(
                    f"The {split} split has {len(empty)} examples without messages: {rows_in_words(empty)}. Remove them."
                )
    elif not _is_conversational(splits, found[0]):
        splits = check_texts(splits, found, drop_empty)
    return {split: dataset.select_columns(list(found)) for split, dataset in splits.items()}, found


def tokenize_texts(
    splits: Splits, name: str, tokenizer: PreTrainedTokenizerBase, max_length: int, packing: bool = False
) -> Splits:
    """
    Tokenize the splits for the plain Trainer. Each text ends in EOS.

    Args:
        splits (`dict[str, Dataset]`): The texts.
        name (`str`): Their column.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        max_length (`int`): Tokens at which texts are cut.
        packing (`bool`, *optional*, defaults to `False`):
            Join the texts of the training split, and split the result into rows of exactly `max_length` tokens. What
            remains at the end of every thousand texts is dropped.

    Raises:
        UserError: If all training texts together are shorter than one row.
    """
    ends_texts_itself = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    ending = "" if ends_texts_itself else tokenizer.eos_token or ""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [text + ending for text in rows[name]]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        return {**encoded, "labels": [list(tokens) for tokens in encoded["input_ids"]]}

    def pack(rows: dict[str, list]) -> dict[str, list]:
        texts = [text + ending for text in rows[name]]
        tokens = list(itertools.chain.from_iterable(tokenizer(texts)["input_ids"]))
        packed = [tokens[i : i + max_length] for i in range(0, len(tokens) - max_length + 1, max_length)]
        return {
            "input_ids": packed,
            "attention_mask": [[1] * max_length for _ in packed],
            "labels": [list(row) for row in packed],
        }

    tokens = {
        split: dataset.map(pack if packing and split == "train" else encode, batched=True, remove_columns=[name])
        for split, dataset in splits.items()
    }
    if packing and isinstance(tokens["train"], Dataset) and not len(tokens["train"]):
        raise UserError(
            f"packing: the training texts are shorter than max_length={max_length} tokens; lower max_length."
        )
    return tokens


def _is_conversational(splits: Splits, name: str) -> bool:
    feature = (splits["train"].features or {}).get(name)
    return feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string")
