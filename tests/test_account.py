"""The account of a generation: counted by hand, and as generate() makes it."""

import torch
from tiny_calibrators import make_bound, make_vocabulary

from calibfuse.account import Account, Ledger
from calibfuse.fusion import FusionConfig, Moved
from calibfuse.processor import CalibFusion


def enter(*step):
    ledger = Ledger()
    ledger.enter(*step)
    ledger.settle()


def moved(*entries):
    places, ids, before, after = zip(*entries, strict=True)
    probabilities = (torch.tensor(each).log() for each in (before, after))
    return Moved.of(*probabilities, torch.tensor(ids), torch.tensor(places), 1 + max(places))


def test_figures_of_a_step_by_hand():
    first, second, third = Account(), Account(), Account()
    enter(
        [first, second, third],
        moved((0, 7, 0.5, 0.2), (0, 8, 0.5, 0.8), (1, 7, 0.6, 0.5995), (1, 8, 0.4, 0.4005), (2, 7, 0.9, 0.1)),
        torch.tensor([False, False, True]),
    )
    assert (first.steps, first.touched, first.left_alone) == (1, 1, 0)
    assert abs(first.moved_mass - 0.3) < 1e-6
    assert list(first.lowered) == [7]
    assert (second.steps, second.touched, dict(second.lowered)) == (1, 0, {})
    assert (third.steps, third.left_alone) == (0, 1)


def test_accounts_add_up_and_tokens_are_masked():
    vocabulary = make_vocabulary()
    token = next(number for number in range(len(vocabulary)) if len(vocabulary.token_bytes(number).strip()) >= 2)
    text = vocabulary.token_bytes(token).decode().strip()
    total, step = Account(), Account()
    enter([step], moved((0, token, 0.5, 0.1), (0, 1, 0.5, 0.9)))
    total.add(step)
    total.add(step)
    report = total.report(vocabulary)
    assert (report.steps, report.touched, report.touched_share) == (2, 2, 1.0)
    assert report.lowered[0][0] == text[0] + "*" * (len(text) - 1)
    assert abs(report.lowered[0][1] - 0.8) < 1e-6
    assert total.report(vocabulary, mask=str).lowered[0][0] == text
    assert str(report).startswith("2 steps, 2 touched, 40.0% of the probability moved; most lowered: ")


def test_a_generation_is_accounted_for_step_by_step(tiny_gpt2):
    bound = make_bound()
    model = tiny_gpt2(vocab_size=96)
    seen = []
    fusion = CalibFusion(bound, FusionConfig(alpha=3.0), on_step=seen.append)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[fusion], **options)
    report = fusion.report()
    assert report.steps == 12  # two rows
    assert report.touched == sum(each.touched for each in seen)
    assert len(seen) == 6
    assert 0.0 < report.moved_mass < 1.0
    off = CalibFusion(bound, FusionConfig(alpha=0.0))
    model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[off], **options)
    assert (off.report().touched, off.report().moved_mass) == (0, 0.0)


def test_mass_is_the_total_variation_distance_and_dead_rows_are_counted():
    bound = make_bound()
    fusion = CalibFusion(bound, FusionConfig(alpha=3.0))
    scores = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    scores[1] = -torch.inf
    fused = fusion(torch.tensor([[5, 6], [7, 8], [9, 10]]), scores)
    distance = 0.5 * (fused[[0, 2]].exp() - scores[[0, 2]].softmax(-1)).abs().sum(-1)
    report = fusion.report()
    assert (report.steps, report.left_alone) == (2, 1)
    assert abs(report.moved_mass - float(distance.mean())) < 1e-5
