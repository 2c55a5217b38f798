"""q in closed form: by hand, its invariants, and the one way of calling it wrongly."""

import pytest
import torch

from calibfuse.errors import InputError
from calibfuse.finetune.tuning import constrained_log_probs


def test_worked_by_hand():
    """(.5, .3, .2) times (1, .5, 0) is (.5, .15, 0); divided by .65."""
    q = constrained_log_probs(torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([1.0, 0.5, 0.0]).log()).exp()
    torch.testing.assert_close(q, torch.tensor([0.5, 0.15, 0.0]) / 0.65)


def test_a_constant_r_changes_nothing():
    log_p = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    torch.testing.assert_close(constrained_log_probs(log_p, torch.full_like(log_p, -3.0)), log_p)


def test_constants_per_row_cancel():
    generator = torch.Generator().manual_seed(1)
    logits, log_r = (torch.randn(4, 9, generator=generator) for _ in range(2))
    moved = constrained_log_probs(logits + 5.0, log_r - torch.arange(4.0)[:, None])
    torch.testing.assert_close(moved, constrained_log_probs(logits, log_r))


def test_excluded_tokens_stay_excluded():
    log_p = torch.tensor([0.5, 0.5, 0.0]).log()
    assert constrained_log_probs(log_p, torch.tensor([-1.0, -2.0, 0.0]))[2] == -torch.inf


def test_strength_multiplies_log_r():
    log_p, r = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.4])
    torch.testing.assert_close(constrained_log_probs(log_p, 2 * r.log()).exp(), r**2 / (r**2).sum())


def test_another_vocabulary():
    with pytest.raises(InputError, match=r"one shape, got \(3,\) and \(4,\)"):
        constrained_log_probs(torch.zeros(3), torch.zeros(4))
