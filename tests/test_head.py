"""The fused head agrees with log-softmax of all logits, values and every gradient, however its work is cut up."""

import pytest
import torch
from torch import nn

from ppl_lm.lm.scoring import head as heads


def plain(hidden, head, tokens):
    return head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1).gather(-1, tokens)


@pytest.mark.parametrize("chunk", [1, 64, 200, 2**24])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("choices", [1, 3])
def test_values_and_gradients_are_those_of_log_softmax(monkeypatch, chunk, bias, choices):
    """A mutant that forgets the softmax's mean, or uses one position's total for another's, differs by 0.1."""
    monkeypatch.setattr(heads, "CHUNK", chunk)
    monkeypatch.setattr(heads, "KEPT", chunk)
    head = nn.Linear(5, 23, bias=bias).double()
    hidden = (3 * torch.randn(4, 6, 5, dtype=torch.float64)).requires_grad_(True)
    tokens, coming = torch.randint(23, (4, 6, choices)), torch.randn(4, 6, choices, dtype=torch.float64)
    wanted = (hidden, *head.parameters())
    found = [f(hidden, head, tokens) for f in (heads.chosen_log_probs, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(value, wanted, coming) for value in found), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_what_needs_no_gradient_gets_none():
    head, hidden = nn.Linear(5, 23), torch.randn(7, 5)
    tokens = torch.randint(23, (7, 1))
    assert not heads.chosen_log_probs(hidden, head.requires_grad_(False), tokens).requires_grad
    heads.chosen_log_probs(hidden.requires_grad_(True), head, tokens).sum().backward()
    assert hidden.grad is not None and head.weight.grad is None
    hidden.grad = None
    heads.chosen_log_probs(hidden.detach(), head.requires_grad_(True), tokens).sum().backward()
    assert hidden.grad is None and head.weight.grad is not None and head.bias.grad is not None


def test_impossible_tokens_are_impossible():
    head = nn.Linear(1, 3, bias=False).double()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0], [-torch.inf]]))
    found = heads.chosen_log_probs(torch.ones(1, 1, dtype=torch.float64), head, torch.tensor([[2, 1]]))
    assert found[0, 0] == -torch.inf and found[0, 1].isfinite()


def test_half_precision_is_summed_in_single_precision():
    head = nn.Linear(16, 1000, bias=False).bfloat16()
    hidden, tokens = torch.randn(9, 16).bfloat16(), torch.randint(1000, (9, 1))
    found = heads.chosen_log_probs(hidden, head, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(hidden, head, tokens), rtol=0, atol=1e-4)


def test_the_gradient_of_a_half_precision_head_does_not_get_worse_by_parts(monkeypatch):
    """Added up in bfloat16, it is off by a twentieth of itself after a few hundred parts."""
    head = nn.Linear(16, 50, bias=True).bfloat16()
    hidden, tokens = torch.randn(800, 16).bfloat16(), torch.randint(50, (800, 1))
    exact = nn.Linear(16, 50)
    exact.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    right = torch.autograd.grad(plain(hidden.float(), exact, tokens).sum(), list(exact.parameters()))
    monkeypatch.setattr(heads, "CHUNK", 100)
    monkeypatch.setattr(heads, "KEPT", 100)
    found = torch.autograd.grad(heads.chosen_log_probs(hidden, head, tokens).sum(), list(head.parameters()))
    for one, other in zip(found, right, strict=True):
        assert float((one.float() - other).norm()) < 0.01 * float(other.norm())


@pytest.mark.parametrize("rows", [1, 4, heads.FEW_ROWS, heads.FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_logits_are_those_of_the_layer(rows, bias, dtype):
    head, hidden = nn.Linear(5, 23, bias=bias).to(dtype), torch.randn(rows, 5).to(dtype)
    with torch.no_grad():
        right, found = head(hidden), heads.all_logits(hidden, head)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.is_contiguous()
    torch.testing.assert_close(found, right.to(found.dtype), rtol=0, atol={8: 1e-13, 4: 1e-5, 2: 0.05}[dtype.itemsize])
