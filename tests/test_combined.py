"""Several calibrators in one processor: their shifts are added, whatever way the fusion is asked."""

import copy
import itertools
import math

import pytest
import torch
from tiny_calibrators import BOS, PAD, make_bound

from calibfuse.errors import FusionNotAppliedError, InputError, MissingHeadError, VocabularyMismatchError
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion

SIZE = 96
CONFIGS = (
    FusionConfig(alpha=2.0, margin=0.1, max_shift=3.0, mass_to_others=True),
    FusionConfig(alpha=0.7, margin=0.4, max_shift=5.0, candidates=40),
    FusionConfig(alpha=1.3, max_shift=2.0, candidates=20),
)


@pytest.fixture(scope="module")
def bounds():
    return [make_bound(seed, strength=2.0) for seed in range(3)]


@pytest.fixture
def fusions(bounds):
    return [CalibFusion(bound, config) for bound, config in zip(bounds, CONFIGS, strict=True)]


def random_ids(rows=2, length=6, seed=0):
    return torch.randint(3, SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_scores(*shape, seed=0):
    return torch.randn(*shape, SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def test_equals_the_sum_computed_by_hand(bounds):
    """Two-sided for one of them, without mass_to_others, over the whole vocabulary: plain arithmetic."""
    configs = (
        FusionConfig(alpha=1.5, margin=0.2, max_shift=2.0, candidates=0),
        FusionConfig(alpha=0.5, max_shift=4.0, candidates=0, one_sided=False),
    )
    combined = CalibFusion.combine([CalibFusion(bound, each) for bound, each in zip(bounds, configs, strict=False)])
    ids, scores = random_ids(), random_scores(2)
    covered = bounds[0].covers(torch.arange(SIZE))

    def disagreement(bound):
        heads = [
            each(ids)[:, -1].masked_fill(~covered, -math.inf) for each in (bound.log_probs, bound.reference_log_probs)
        ]
        calibrator, reference = (head.log_softmax(-1).masked_fill(~covered, 0.0) for head in heads)
        return calibrator - reference

    first, second = disagreement(bounds[0]), disagreement(bounds[1])
    shift = (1.5 * (first.sign() * (first.abs() - 0.2).clamp(min=0.0))).clamp(max=0.0) + 0.5 * second
    before = scores.log_softmax(-1)
    after = (before + shift.clamp(-4.0, 4.0)).masked_fill(~covered, -math.inf).log_softmax(-1)
    mass = before.masked_fill(~covered, -math.inf).logsumexp(-1, keepdim=True)
    expected = torch.where(covered, after + mass, before)
    assert bool((shift > 0.0).any())
    torch.testing.assert_close(combined(ids, scores), expected, atol=1e-4, rtol=1e-4)


def test_one_alone_equals_itself(fusions):
    ids, scores = random_ids(), random_scores(2)
    for fusion in fusions:
        assert not torch.equal(fusion(ids, scores), scores.log_softmax(-1))
        torch.testing.assert_close(CalibFusion.combine([fusion])(ids, scores), fusion(ids, scores))


def test_one_with_a_value_head_alone_equals_itself_and_counts_among_others(fusions):
    heads = ("calibrator", "reference", "value")
    fusion = CalibFusion(make_bound(5, heads=heads, value_layer_count=1), FusionConfig(alpha=2.0, value_weight=0.4))
    ids, scores = random_ids(), random_scores(2)
    torch.testing.assert_close(CalibFusion.combine([fusion])(ids, scores), fusion(ids, scores))
    both, swapped = (CalibFusion.combine(each)(ids, scores) for each in ([fusion, fusions[1]], [fusions[1], fusion]))
    torch.testing.assert_close(both, swapped)
    assert not torch.allclose(both, fusion(ids, scores))


def test_each_adds_to_what_the_others_do_and_their_order_does_not_matter(fusions):
    ids, scores = random_ids(), random_scores(2)
    expected = CalibFusion.combine(fusions)(ids, scores)
    for order in itertools.permutations(fusions):
        torch.testing.assert_close(CalibFusion.combine(order)(ids, scores), expected, atol=1e-5, rtol=1e-5)
    for left_out in range(3):
        others = [fusion for at, fusion in enumerate(fusions) if at != left_out]
        assert not torch.allclose(CalibFusion.combine(others)(ids, scores), expected, atol=1e-2)


def test_the_largest_bound_and_the_widest_choice_hold(fusions):
    config = CalibFusion.combine(fusions).config
    assert config == FusionConfig(alpha=1.0, max_shift=5.0, mass_to_others=True, candidates=None)
    assert CalibFusion.combine(fusions[1:]).config.candidates == 40


def test_its_strength_multiplies_the_sum(bounds):
    configs = [FusionConfig(alpha=alpha, candidates=0) for alpha in (0.8, 0.3, 1.6, 0.6)]
    halves, wholes = ([CalibFusion(bounds[at % 2], each) for at, each in part] for part in (
        list(enumerate(configs))[:2], list(enumerate(configs))[2:]
    ))  # fmt: skip
    ids, scores = random_ids(), random_scores(2)
    result = CalibFusion.combine(halves).set(alpha=2.0)(ids, scores)
    torch.testing.assert_close(result, CalibFusion.combine(wholes)(ids, scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_cached_decoding_equals_recomputation_and_whole_sequences(fusions, rows):
    """Also with left padding, and with rows that change places, as beams do."""
    ids = random_ids(rows, 12)
    ids[0, :3] = torch.tensor([PAD, PAD, BOS])
    logits = random_scores(rows, 12)
    cached = CalibFusion.combine(fusions)
    whole = CalibFusion.combine(fusions).fuse_logits(ids, logits)
    for end in range(4, 13):
        fresh = CalibFusion.combine(fusions)(ids[:, :end], logits[:, end - 1])
        torch.testing.assert_close(cached(ids[:, :end], logits[:, end - 1]), fresh, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole[:, end - 1], fresh, atol=1e-4, rtol=1e-4)
        ids, logits, whole = ids.flip(0), logits.flip(0), whole.flip(0)


def test_it_counts_reports_resets_and_is_copied_as_one_does(fusions):
    reports = []
    combined = CalibFusion.combine(fusions, on_step=reports.append)
    ids, scores = random_ids(), random_scores(2)
    with pytest.raises(FusionNotAppliedError), combined.required():
        pass
    with combined.required():
        first = combined(ids, scores)
    combined.reset()
    twin = copy.deepcopy(combined)
    torch.testing.assert_close(combined(ids, scores), first)
    torch.testing.assert_close(twin(ids, scores), first)
    assert combined.calls == 2
    assert combined.report().steps == 4  # two rows, two calls
    assert len(reports) == 3


def test_what_cannot_be_combined_is_refused(bounds, fusions):
    with pytest.raises(InputError, match="got none"):
        CalibFusion.combine([])
    with pytest.raises(InputError, match="geometric"):
        CalibFusion.combine([fusions[0], CalibFusion(bounds[1], FusionConfig(mode="geometric"))])
    with pytest.raises(VocabularyMismatchError, match="words"):
        CalibFusion.combine([fusions[0], CalibFusion(make_bound(1, size=90), CONFIGS[1])])
    with pytest.raises(MissingHeadError, match="'calibrator'"):
        CalibFusion.combine([CalibFusion.combine(fusions), fusions[0]])
    with pytest.raises(MissingHeadError, match="'calibrator'"):
        CalibFusion.combine(fusions).set(mode="geometric")
    with pytest.raises(InputError, match="universal"):
        CalibFusion.combine(fusions).add_words("kab")
