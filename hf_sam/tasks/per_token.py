"""Losses and evaluation of models that predict one label a token, where every token should weigh the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class LossPerToken:
    """
    Makes the loss of a trainer the mean over all labelled tokens of an optimizer step, however these are distributed
    over micro-batches and processes.

    Models such as T5 and BERT return the mean over their own micro-batch and take `num_items_in_batch` among their
    keyword arguments without using it. The stock Trainer then neither divides by the accumulation steps nor weighs
    micro-batches by their tokens, so that 8 x 1 and 4 x 2 differ. Here the micro-batch's own mean, label smoothing and
    losses of the model included, is multiplied by its share of the tokens; with one micro-batch a step that share is
    exactly 1, and the run that of the stock Trainer.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # So that the Trainer counts the labelled tokens of the step. DataParallel splits a batch unseen.
        self.model_accepts_loss_kwargs = self.args.n_gpu <= 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        tokens = inputs["labels"].ne(-100).sum()
        found = super().compute_loss(model, inputs, return_outputs=return_outputs)
        if num_items_in_batch is None:
            return found
        loss, outputs = found if return_outputs else (found, None)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = loss * (tokens * processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class GenerationWithLikelihood:
    """
    Makes the predictions of a `Seq2SeqTrainer` `(generated tokens, nll, tokens)`: beside what the model writes, the
    summed negative log-likelihood of each target and how many tokens it has. Without `predict_with_generate` the latter
    two alone, so that logits are never gathered.
    """

    def evaluation_loop(self, *args, **kwargs):
        """
        The Trainer's own, in which every example counts once: `Seq2SeqTrainer` keeps those that fill up the last batch
        of several processes, and lets the loss of a smaller last batch weigh like the others.
        """
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        if prediction_loss_only:
            return super().prediction_step(model, inputs, True, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        generated = ()
        if self.args.predict_with_generate:
            answerless = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
            generated = (super().prediction_step(model, answerless, False, ignore_keys, **gen_kwargs)[1],)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            loss = outputs["loss"] if self.label_smoother is None else self.label_smoother(outputs, labels)
        return loss.detach().mean(), (*generated, *label_nll(outputs["logits"], labels)), labels


def label_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Negative log-likelihood of the labels of each example.

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, classes)`): At the position of each label.
        labels (`torch.Tensor` of shape `(batch, tokens)`): -100 where there is none.

    Returns:
        Sums in nats and numbers of labels, both `(batch,)`.
    """
    losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=1), labels.ne(-100).sum(dim=1)
