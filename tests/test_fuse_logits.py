"""Whole sequences at once give what step-wise calls give at every position."""

import math

import pytest
import torch
from tiny_calibrators import BOS, PAD, make_bound

from calibfuse import processor as processor_module
from calibfuse.errors import InputError, VocabularyMismatchError
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion

SIZE = 96


@pytest.fixture(scope="module")
def bound():
    return make_bound(strength=2.0)


def case(rows=3, length=30, width=SIZE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, min(SIZE, width), (rows, length), generator=generator)
    return ids, torch.randn(rows, length, width, generator=generator) * 3


def step_by_step(fusion, ids, logits):
    return torch.stack([fusion(ids[:, : i + 1], logits[:, i]) for i in range(ids.shape[1])], dim=1)


MODES = [
    FusionConfig(alpha=2.0, candidates=30),
    FusionConfig(alpha=2.0, candidates=0),
    FusionConfig(alpha=2.0, candidates=30, one_sided=False, max_shift=1.0),
    FusionConfig(mode="geometric", alpha=0.4, candidates=30),
    FusionConfig(mode="blend", alpha=0.4),
    FusionConfig(alpha=0.0),
]


@pytest.mark.parametrize("config", MODES, ids=lambda config: f"{config.mode}-{config.alpha}-{config.candidates}")
def test_agrees_with_step_wise_calls(bound, config):
    ids, logits = case()
    fusion = CalibFusion(bound, config)
    whole = fusion.fuse_logits(ids, logits)
    torch.testing.assert_close(whole, step_by_step(fusion, ids, logits), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(whole.logsumexp(-1), torch.zeros(3, 30), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [PAD, BOS])
def test_agrees_with_left_padding(bound, pad):
    ids, logits = case()
    ids[1, :5], ids[2, :29] = pad, pad
    fusion = CalibFusion(bound, MODES[0])
    whole = fusion.fuse_logits(ids, logits)
    torch.testing.assert_close(whole, step_by_step(fusion, ids, logits), atol=2e-4, rtol=1e-4)
    alone = fusion.fuse_logits(ids[1:2, 5:], logits[1:2, 5:])
    torch.testing.assert_close(whole[1:2, 5:], alone, atol=2e-4, rtol=1e-4)


def test_mask_hides_padding_that_is_no_special_token(bound):
    ids, logits = case()
    ids[1, :5] = 44
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    fusion = CalibFusion(bound, MODES[0])
    whole = fusion.fuse_logits(ids, logits, mask)
    alone = fusion.fuse_logits(ids[1:2, 5:], logits[1:2, 5:])
    torch.testing.assert_close(whole[1:2, 5:], alone, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(whole[0], fusion.fuse_logits(ids, logits)[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole[1, 6], fusion.fuse_logits(ids, logits)[1, 6])


def test_padding_on_the_right_does_not_disturb_the_text(bound):
    ids, logits = case()
    mask = torch.ones_like(ids)
    ids[1, 20:], mask[1, 20:] = PAD, 0
    fusion = CalibFusion(bound, MODES[0])
    whole = fusion.fuse_logits(ids, logits, mask)
    alone = fusion.fuse_logits(ids[1:2, :20], logits[1:2, :20])
    torch.testing.assert_close(whole[1:2, :20], alone, atol=2e-4, rtol=1e-4)


def test_of_a_real_model(bound, tiny_llama):
    """The loss of a text under the fused model is the sum of the log-probabilities that decoding would see."""
    model = tiny_llama(SIZE)
    ids, _ = case(rows=2, length=20)
    with torch.no_grad():
        logits = model(ids).logits
    fusion = CalibFusion(bound, MODES[0])
    fused = fusion.fuse_logits(ids, logits)
    for i in (0, 7, 18):
        step = fusion(ids[:, : i + 1], model(ids[:, : i + 1]).logits[:, -1].detach())
        torch.testing.assert_close(fused[:, i], step, atol=1e-3, rtol=1e-3)


def test_in_parts_like_the_whole(bound, monkeypatch):
    ids, logits = case()
    fusion = CalibFusion(bound, MODES[0])
    whole = fusion.fuse_logits(ids, logits)
    for chunk in (1, 3 * SIZE * 7):
        monkeypatch.setattr(processor_module, "_SEQUENCE_CHUNK", chunk)
        calls = fusion.calls
        torch.testing.assert_close(fusion.fuse_logits(ids, logits), whole, atol=1e-4, rtol=1e-4)
        assert fusion.calls == calls + 1, "one call, however many parts"


def test_does_not_disturb_a_running_generation(bound):
    ids, logits = case(rows=2)
    fusion, undisturbed = CalibFusion(bound, MODES[0]), CalibFusion(bound, MODES[0])
    for i in range(10, 14):
        fusion.fuse_logits(*case(seed=i))
        expected = undisturbed(ids[:, :i], logits[:, i])
        torch.testing.assert_close(fusion(ids[:, :i], logits[:, i]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [SIZE - 20, SIZE + 30])
@pytest.mark.parametrize("candidates", [0, 30])
def test_heads_wider_or_narrower_than_the_tokenizer(bound, width, candidates):
    ids, logits = case(width=width)
    if width > SIZE:
        ids[:, 3] = width - 1  # an id that the tokenizer does not have
    fusion = CalibFusion(bound, FusionConfig(alpha=2.0, candidates=candidates))
    whole = fusion.fuse_logits(ids, logits)
    assert whole.shape == logits.shape
    torch.testing.assert_close(whole, step_by_step(fusion, ids, logits), atol=2e-4, rtol=1e-4)


def test_logits_are_not_written_to(bound):
    ids, logits = case()
    before = logits.clone()
    CalibFusion(bound, MODES[0]).fuse_logits(ids, logits)
    assert torch.equal(logits, before)


def test_gradients_reach_the_logits(bound):
    ids, logits = case(rows=1, length=5)
    logits.requires_grad_()
    CalibFusion(bound, MODES[0]).fuse_logits(ids, logits)[0, torch.arange(5), ids[0]].sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_do(bound, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    assert CalibFusion(bound, MODES[0]).fuse_logits(ids, torch.zeros(*shape, SIZE)).shape == (*shape, SIZE)


class TestBadInput:
    """One clear sentence each."""

    @pytest.fixture
    def fusion(self, bound):
        return CalibFusion(bound, MODES[0])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_and_infinity(self, fusion, value):
        ids, logits = case()
        logits[1, 2, 3] = value
        with pytest.raises(InputError, match=r"nan or \+inf"):
            fusion.fuse_logits(ids, logits)

    def test_a_position_without_any_choice_is_left_as_it_is(self, fusion):
        ids, logits = case()
        expected = fusion.fuse_logits(ids, logits)
        logits[1, 2] = -math.inf
        result = fusion.fuse_logits(ids, logits)
        assert (result[1, 2] == -math.inf).all()
        expected[1, 2] = -math.inf
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("wrong", [-1, SIZE])
    def test_ids_outside_the_vocabulary(self, fusion, wrong):
        ids, logits = case()
        ids[1, 4] = wrong
        with pytest.raises(VocabularyMismatchError, match=f"hold {wrong}, outside"):
            fusion.fuse_logits(ids, logits)

    @pytest.mark.parametrize(
        ("ids", "logits"), [((3,), (3, SIZE)), ((2, 3), (2, SIZE)), ((2, 3), (2, 4, SIZE)), ((2, 3), (1, 3, SIZE))]
    )
    def test_shapes(self, fusion, ids, logits):
        with pytest.raises(VocabularyMismatchError, match=r"Expected input_ids \[batch, length\] and logits"):
            fusion.fuse_logits(torch.ones(ids, dtype=torch.int64), torch.zeros(logits))

    def test_shape_of_the_mask(self, fusion):
        ids, logits = case()
        with pytest.raises(VocabularyMismatchError, match=r"attention_mask has shape \(3, 29\)"):
            fusion.fuse_logits(ids, logits, torch.ones(3, 29))
