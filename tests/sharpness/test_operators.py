"""Both operators against dense float64 matrices that are computed another way."""

import pytest
import torch
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.models.bert.modeling_bert import eager_attention_forward

from hf_sam.sharpness import GaussNewton, Hessian, Subset, SubsetLoss

from . import toys

MODELS = {"batch-norm": toys.normed_net, "bert": toys.bert, "tied-masked-lm": toys.tied_masked_lm}


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    """A model in float64, its examples in one batch, and the loss as it is measured, in two batches."""
    model, examples = MODELS[request.param]()
    model.double().eval()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4), dtype=torch.float64)
    batch = toys.collate(examples)
    return model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}, loss


def dense(operator) -> torch.Tensor:
    columns = torch.eye(operator.shape[0], dtype=torch.float64)
    return torch.stack(operator.products(list(columns)), dim=1)


def flat_gradient(model) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def finite_difference_hessian(model, batch, step: float = 1e-6) -> torch.Tensor:
    """Central differences of `backward` gradients of the whole batch at once."""
    columns = []
    for p in model.parameters():
        for i in range(p.numel()):
            gradients = []
            for sign in (1, -1):
                original = p.data.view(-1)[i].item()
                p.data.view(-1)[i] = original + sign * step
                model.zero_grad()
                model(**batch).loss.backward()
                gradients.append(flat_gradient(model))
                p.data.view(-1)[i] = original
            columns.append((gradients[0] - gradients[1]) / (2 * step))
    model.zero_grad()
    return torch.stack(columns, dim=1)


def test_hessian_is_the_finite_difference_of_backward(case):
    model, batch, loss = case
    expected = finite_difference_hessian(model, batch)
    assert torch.linalg.eigvalsh(expected)[0] < -1e-3, "an indefinite Hessian is the case to test"
    torch.testing.assert_close(dense(Hessian(loss)), expected, atol=2e-8, rtol=1e-6)


def explicit_gauss_newton(model, batch, shifted: bool) -> torch.Tensor:
    """`sum_n J_n^T (diag q_n - q_n q_n^T) J_n / N`, the Jacobians one output at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(values):
        return functional_call(model, values, kwargs=batch).logits

    jacobian = torch.func.jacrev(logits, chunk_size=1)(parameters)
    z, labels = logits(parameters).detach(), batch["labels"]
    jacobian = torch.cat([part.reshape(*z.shape, -1) for part in jacobian.values()], dim=-1)
    if shifted:
        z, jacobian, labels = z[:, :-1], jacobian[:, :-1], labels[:, 1:]
    counted = labels != -100
    z, jacobian = z[counted], jacobian[counted]  # (N, classes), (N, classes, P)
    q = z.softmax(-1)
    return torch.einsum(
        "ncp,ncd,ndq->pq", jacobian, torch.diag_embed(q) - q[:, :, None] * q[:, None, :], jacobian
    ) / len(z)


def test_gauss_newton_is_the_sum_of_explicit_jacobians(case):
    model, batch, loss = case
    matrix = dense(GaussNewton(loss))
    torch.testing.assert_close(matrix, explicit_gauss_newton(model, batch, shifted=False), atol=1e-12, rtol=1e-9)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-12


def test_gauss_newton_of_a_causal_language_model_counts_the_predicted_tokens():
    model, examples = toys.tied_gpt2()
    model.double().eval()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4), dtype=torch.float64)
    expected = explicit_gauss_newton(model, toys.collate(examples), shifted=True)
    # transformers computes the loss of causal language models in float32 whatever the logits are
    torch.testing.assert_close(dense(GaussNewton(loss)), expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-4)


def test_hessian_through_gated_units_and_rms_norm():
    """A Llama in float32, which its normalisation computes in anyway, against differences of gradients."""
    model, examples = toys.llama()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4))
    v = torch.nn.functional.normalize(
        torch.randn(loss.weights.shape, generator=torch.Generator().manual_seed(0)), dim=0
    )
    step = 1e-2
    differences = [loss.gradient(loss.weights + sign * step * v)[1] for sign in (1, -1)]
    expected = (differences[0] - differences[1]) / (2 * step)
    product = Hessian(loss) @ v
    assert (product - expected).norm() < 2e-3 * expected.norm()


def test_products_elsewhere_than_at_the_model_s_weights():
    matrix = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    model, subset = toys.quadratic(matrix, torch.ones(4, dtype=torch.float64))
    loss = SubsetLoss(model, subset, dtype=torch.float64)
    elsewhere = torch.full((4,), 7.0, dtype=torch.float64)
    torch.testing.assert_close(dense(Hessian(loss, elsewhere)), matrix)


def test_the_scipy_operator_multiplies_like_the_tensor_one(case):
    _, _, loss = case
    vector = torch.randn(loss.weights.numel(), dtype=torch.float64)
    operator = Hessian(loss)
    torch.testing.assert_close(torch.from_numpy(operator.to_scipy() @ vector.numpy()), operator @ vector)


class OnceDifferentiable(torch.autograd.Function):
    """Stands for a fused attention kernel."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def fused_attention(module, query, key, value, attention_mask, **kwargs):
    output, weights = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return OnceDifferentiable.apply(output), weights


AttentionInterface.register("fused", fused_attention)


def test_attention_without_a_second_derivative_is_switched_and_switched_back():
    plain, examples = toys.bert()
    fused, _ = toys.bert(attn_implementation="fused")
    subset = Subset(examples, toys.collate)
    vector = torch.ones(SubsetLoss(plain, subset).weights.numel())
    torch.testing.assert_close(Hessian(SubsetLoss(fused, subset)) @ vector, Hessian(SubsetLoss(plain, subset)) @ vector)
    assert fused.config._attn_implementation == "fused"
    assert fused.bert.config._attn_implementation == "fused"


def test_attention_that_cannot_be_switched_is_refused_with_the_remedy(monkeypatch):
    model, examples = toys.bert(attn_implementation="fused")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        SubsetLoss(model, Subset(examples, toys.collate))


def test_any_other_kernel_without_a_second_derivative_is_refused_with_the_remedy():
    model, examples = toys.normed_net()
    model.layers[2].forward = OnceDifferentiable.apply
    loss = SubsetLoss(model, Subset(examples, toys.collate))
    loss.gradient()  # once is no problem
    for operator in (Hessian, GaussNewton):
        with pytest.raises(ValueError, match=r"cannot be differentiated twice.*attn_implementation='eager'"):
            operator(loss)


def test_gauss_newton_without_logits_is_refused():
    model, subset = toys.quadratic(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    loss = SubsetLoss(model, subset)
    with pytest.raises(ValueError, match="logits"):
        GaussNewton(loss) @ loss.weights
