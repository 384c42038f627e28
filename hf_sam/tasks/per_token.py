"""Loss and evaluation of models that predict one label per token, with equal weight for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class LossPerToken:
    """
    Mixin that makes the loss of a trainer the mean over all labelled tokens of an optimizer step, however these are
    distributed over micro-batches and processes.

    Models such as T5 and BERT return the mean over the micro-batch; they accept `num_items_in_batch` as a keyword
    argument but do not use it. The stock Trainer then neither divides by the accumulation steps nor weights
    micro-batches by their tokens, so that 8 x 1 and 4 x 2 differ.

    Here the mean over the micro-batch, including label smoothing and auxiliary losses of the model, is multiplied by its
    share of the tokens. With one micro-batch per step that share is exactly 1, and the run equals the stock Trainer's.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # True makes the Trainer count the labelled tokens of the step. DataParallel splits a batch unseen by the Trainer.
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
    Mixin that makes a `Seq2SeqTrainer` predict `(generated tokens, nll, tokens)`: the generated text, the summed negative
    log-likelihood of each target, and its number of tokens. Without `predict_with_generate` only the latter two are
    returned, so that logits are never gathered.
    """

    def evaluation_loop(self, *args, **kwargs):
        """
        Run the Trainer's loop so that every example counts once: `Seq2SeqTrainer` keeps the examples that pad the last
        batch across processes, and gives a smaller last batch the same weight as the others.
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
    Compute the negative log-likelihood of the labels of each example.

    Args:
        logits (`torch.Tensor` of shape `(batch, tokens, classes)`): Logits at the position of each label.
        labels (`torch.Tensor` of shape `(batch, tokens)`): -100 at positions without a label.

    Returns:
        Sums in nats and numbers of labels, both `(batch,)`.
    """
    losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(dim=1), labels.ne(-100).sum(dim=1)
