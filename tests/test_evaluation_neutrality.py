"""What a method does to neutral text: nothing is nothing, and everything else equals a slow computation."""

import math

import pytest
import torch
from tiny_calibrators import make_calibrator
from torch.nn import functional
from transformers import LogitsProcessor

from calibfuse.evaluation import GuidedReader, measure_neutrality
from calibfuse.evaluation.given_text.neutrality import BENIGN_TEXTS, GROUP_WORDS, PLAIN_GROUP, TEMPLATES, divergence
from calibfuse.evaluation.given_text.reading import method_log_probs, split_ids
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion

TEXTS = ["The river was wide and slow.", "She said nothing at all", "It rained"]
WORDS = {"one": ("tall", "blind"), "two": ("well known",)}
BEGINNINGS = ("The new teacher is", "He was")


@pytest.fixture(scope="module")
def guide(target):
    return make_calibrator().bind(target.tokenizer, use_disk_cache=False)


class StepByStep(LogitsProcessor):
    """A fusion without `fuse_logits`."""

    def __init__(self, fusion):
        self.fusion = fusion

    def __call__(self, input_ids, scores):
        return self.fusion(input_ids, scores)


def measure(target, processors, **how):
    settings = {"templates": BEGINNINGS, "group_words": WORDS, "plain_words": ("late",)}
    return measure_neutrality(GuidedReader(target, lambda: processors, **how), TEXTS, **settings)


def slow_log_prob(target, processors, before, after):
    """Log-probability of ids, one step at a time."""
    ids, total = list(before), 0.0
    for token_id in after:
        row = torch.tensor([ids])
        with torch.no_grad():
            scores = target.model(row).logits[:, -1]
        for processor in processors:
            scores = processor(row, scores)
        total += float(scores.log_softmax(-1)[0, token_id])
        ids.append(token_id)
    return total


@pytest.mark.parametrize("alpha", [None, 0.0], ids=["no-processor", "alpha-0"])
def test_nothing_is_nothing(target, guide, alpha):
    processors = [] if alpha is None else [CalibFusion(guide, FusionConfig(alpha=alpha))]
    found = measure(target, processors)
    assert found.divergence == pytest.approx(0.0, abs=1e-6)
    assert found.reverse_divergence == pytest.approx(0.0, abs=1e-6)
    assert found.kept == pytest.approx(1.0, abs=1e-4)
    assert all(word.kept == pytest.approx(1.0, abs=1e-4) for word in found.words)


def test_figures_equal_a_slow_computation(target, guide):
    fusion = CalibFusion(guide, FusionConfig(alpha=1.5))
    found = measure(target, [fusion])
    forward, backward, count = 0.0, 0.0, 0
    for text in TEXTS:
        before, after = split_ids(target.tokenizer, "", text)
        ids = [*before, *after]
        for place in range(1, len(ids)):
            row = torch.tensor([ids[:place]])
            with torch.no_grad():
                plain = target.model(row).logits[:, -1].log_softmax(-1)
            fused = fusion(row, plain)
            forward += float(functional.kl_div(fused, plain, log_target=True, reduction="sum"))
            backward += float(functional.kl_div(plain, fused, log_target=True, reduction="sum"))
            count += 1
    assert found.tokens == count
    assert found.divergence == pytest.approx(forward / count, rel=1e-3)
    assert found.reverse_divergence == pytest.approx(backward / count, rel=1e-3)
    for word in found.words:
        shifts = []
        for template in BEGINNINGS:
            pair = split_ids(target.tokenizer, template, f" {word.word}")
            shifts.append(slow_log_prob(target, [fusion], *pair) - slow_log_prob(target, [], *pair))
        assert word.kept == pytest.approx(math.exp(sum(shifts) / len(shifts)), rel=1e-3)


def test_whole_sequences_and_single_steps_agree(target, guide):
    fusion = CalibFusion(guide, FusionConfig(alpha=1.5))
    at_once, by_steps = measure(target, [fusion]), measure(target, [StepByStep(fusion)], batch_size=2)
    assert by_steps.divergence == pytest.approx(at_once.divergence, rel=1e-3)
    for one, other in zip(at_once.words, by_steps.words, strict=True):
        assert other.kept == pytest.approx(one.kept, rel=1e-3)


def test_a_forbidden_token_makes_the_divergence_infinite_one_way_only(target):
    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, 300:] = -torch.inf
            return scores

    found = measure(target, [Forbid()])
    assert found.divergence == math.inf
    assert 0.0 < found.reverse_divergence < math.inf
    assert any(word.kept == 0.0 for word in found.words)


def test_groups_and_the_lowest_word_leave_plain_words_out(target, guide):
    found = measure(target, [CalibFusion(guide, FusionConfig(alpha=3.0))])
    groups = found.groups()
    assert list(groups) == ["one", "two", PLAIN_GROUP]
    kept = {word.word: word.kept for word in found.words}
    assert groups["one"] == pytest.approx(math.sqrt(kept["tall"] * kept["blind"]))
    assert found.kept == pytest.approx((kept["tall"] * kept["blind"] * kept["well known"]) ** (1 / 3))
    assert found.lowest_word.word == min(("tall", "blind", "well known"), key=kept.get)


def test_divergence_takes_excluded_tokens():
    one = torch.tensor([0.5, 0.5, 0.0]).log()
    other = torch.tensor([0.25, 0.5, 0.25]).log()
    assert float(divergence(one, other)) == pytest.approx(0.5 * math.log(2))
    assert float(divergence(other, one)) == math.inf


def test_processors_act_in_their_order(target):
    """Positions before the start are only normalised by step-wise processors; the logits come as they are."""

    class Double(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores * 2

    logits = torch.randn(1, 3, 5)
    found = method_log_probs([Double()], torch.zeros(1, 3, dtype=torch.long), logits, start=1)
    assert torch.allclose(found[:, 0], logits[:, 0].log_softmax(-1))
    assert torch.allclose(found[:, 1:], (logits[:, 1:] * 2).log_softmax(-1))


def test_the_first_processor_gets_logits_as_in_generate(target):
    """A soft cap is undone on logits; log-probabilities would be refused (mode embedding on Gemma 2)."""
    seen = []

    class Whole(LogitsProcessor):
        def fuse_logits(self, input_ids, logits, attention_mask=None):
            seen.append(logits)
            return logits.log_softmax(-1)

    logits = 3.0 + torch.randn(1, 3, 5)
    method_log_probs([Whole(), Whole()], torch.zeros(1, 3, dtype=torch.long), logits)
    assert torch.equal(seen[0], logits)
    assert torch.allclose(seen[1], logits.log_softmax(-1))


def test_the_bundled_text_is_distinct_and_names_groups_once():
    words = [word for members in GROUP_WORDS.values() for word in members]
    for collection in (TEMPLATES, BENIGN_TEXTS, words):
        assert len(set(collection)) == len(collection)
    assert not any(template.endswith(" ") for template in TEMPLATES)
