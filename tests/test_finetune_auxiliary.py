"""The auxiliary model: what it says, how it is saved, and that decoding with it is right."""

import copy
import math

import pytest
import torch
from small_world import softened
from test_decoding import generate
from tiny_calibrators import EOS, PAD, make_calibrator, make_vocabulary

from calibfuse.calibrator import Calibrator
from calibfuse.calibrator import Calibrator as UniversalCalibrator
from calibfuse.errors import (
    CheckpointError,
    CheckpointFormatError,
    DataError,
    InputError,
    ScorerError,
    VocabularyMismatchError,
)
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion
from calibfuse.value.auxiliary import load_auxiliary_model, make_auxiliary_model
from calibfuse.value.auxiliary_training import (
    AuxiliaryTrainingConfig,
    bernoulli_cross_entropy,
    bernoulli_kl,
    log_one_minus_exp,
    normalised_weights,
    train_auxiliary,
)
from calibfuse.value.samples import SampleSet

VOCAB = 96
CONFIG = FusionConfig(mode="value", alpha=4.0, candidates=40, max_shift=20.0)


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(VOCAB)


def make(target, vocabulary=None, strength=1.0, calibrator=None):
    """An auxiliary model with large random weights, so that it has something to say."""
    calibrator = calibrator or make_calibrator()
    auxiliary = make_auxiliary_model(target, vocabulary or make_vocabulary(), seed=0, calibrator=calibrator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        auxiliary.head.query.weight.normal_(std=strength)
        auxiliary.bias_table.normal_(std=0.5)
    return auxiliary.eval()


def bind(auxiliary, folder, vocabulary=None):
    auxiliary.save_pretrained(folder)
    return Calibrator.from_pretrained(folder).bind(vocabulary or make_vocabulary(), use_disk_cache=False)


def ids_and_mask(rows=3, length=9, padded=True, seed=0):
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        ids[row, : 2 * row] = PAD
        mask[row, : 2 * row] = 0
    return ids, mask


class TestWhatItSays:
    @pytest.fixture(autouse=True)
    def without_gradients(self):
        with torch.no_grad():
            yield

    def test_log_r_has_the_targets_width_and_is_no_more_than_zero(self, target):
        ids, _ = ids_and_mask(padded=False)
        log_r = make(target)(ids)
        assert log_r.shape == (3, 9, VOCAB)
        assert log_r.dtype == torch.float32
        assert bool((log_r <= 0).all())
        assert float(log_r.std()) > 0.1

    def test_a_fresh_model_says_the_same_of_all_tokens(self, target):
        fresh = make_auxiliary_model(target, make_vocabulary(), seed=0, calibrator=make_calibrator())
        ids, _ = ids_and_mask(padded=False)
        assert fresh.is_fresh
        torch.testing.assert_close(fresh(ids).exp(), torch.full((3, 9, VOCAB), 0.5))
        fresh.set_prior(0.9)
        assert float((fresh(ids).exp() - 0.9).abs().mean()) < 0.1

    def test_left_padding_changes_nothing(self, target):
        auxiliary = make(target)
        ids, mask = ids_and_mask()
        padded = auxiliary(ids, mask)
        for row in range(3):
            alone = auxiliary(ids[row : row + 1, 2 * row :])
            torch.testing.assert_close(padded[row : row + 1, 2 * row :], alone, atol=1e-4, rtol=1e-4)

    def test_right_padding_changes_nothing(self, target):
        auxiliary = make(target)
        ids, _ = ids_and_mask(padded=False)
        mask = torch.ones_like(ids)
        ids[1, 6:], mask[1, 6:] = PAD, 0
        torch.testing.assert_close(auxiliary(ids, mask)[1, :6], auxiliary(ids[1:2, :6])[0], atol=1e-4, rtol=1e-4)

    def test_the_cheap_way_for_the_next_token_says_the_same(self, target):
        auxiliary = make(target)
        ids, mask = ids_and_mask()
        positions = torch.zeros_like(ids, dtype=torch.bool)
        positions[:, 4:-1] = True
        states = auxiliary.states(ids, mask)
        every = auxiliary.of_all(states, ids, positions)
        following = ids.roll(-1, 1)[positions]
        expected = every.gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(auxiliary.of_next(states, ids, positions), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(every, auxiliary(ids, mask)[positions])

    def test_saving_and_loading_is_exact(self, target, tmp_path):
        auxiliary = make(target)
        ids, mask = ids_and_mask()
        auxiliary.save_pretrained(tmp_path)
        again = load_auxiliary_model(tmp_path, target, make_vocabulary())
        assert not again.is_fresh
        assert torch.equal(again(ids, mask), auxiliary(ids, mask))

    def test_the_bound_guide_says_the_same_as_the_model(self, target, tmp_path):
        auxiliary = make(target)
        ids, mask = ids_and_mask()
        guide = bind(auxiliary, tmp_path)
        assert "value" in guide.heads
        log_r = guide.sequence(ids, mask).log_scores("value")
        text = slice(3, None)  # tokens without bytes: see test_special_tokens_are_neutral
        kept = mask.bool()
        torch.testing.assert_close(log_r[kept][:, text], auxiliary(ids, mask)[kept][:, text], atol=1e-4, rtol=1e-4)
        chosen = torch.randint(3, VOCAB, (3, 9, 5))
        some = guide.sequence(ids, mask).log_scores("value", chosen)
        torch.testing.assert_close(some, log_r.gather(-1, chosen), atol=1e-4, rtol=1e-4)

    def test_a_head_wider_than_the_tokenizer(self, tiny_llama):
        wide = tiny_llama(VOCAB + 32)
        auxiliary = make(wide)
        assert auxiliary(ids_and_mask(padded=False)[0]).shape[-1] == VOCAB + 32


@torch.no_grad()
def test_special_tokens_are_neutral_in_a_calibrator(target):
    """R of a token without bytes is R of the prefix; also in prefixes that end with one."""
    auxiliary = make(target)
    ids, _ = ids_and_mask(rows=1, padded=False)
    log_r = auxiliary(ids)
    for place in range(1, 9):
        said = log_r[0, place - 1, ids[0, place]]
        torch.testing.assert_close(log_r[0, place, :3], said.expand(3), atol=1e-5, rtol=1e-5)
    ids[0, 5] = EOS
    log_r = auxiliary(ids)
    torch.testing.assert_close(log_r[0, 5, 0], log_r[0, 3, ids[0, 4]])


def test_the_other_heads_of_the_calibrator_are_unchanged(target, tmp_path):
    calibrator = make_calibrator()
    auxiliary = make(target, calibrator=calibrator)
    guide = bind(auxiliary, tmp_path)
    before = calibrator.bind(make_vocabulary(), use_disk_cache=False)
    ids, mask = ids_and_mask()
    assert guide.heads == ("calibrator", "reference", "value")
    assert torch.equal(guide.log_probs(ids, mask), before.log_probs(ids, mask))
    assert torch.equal(guide.reference_log_probs(ids, mask), before.reference_log_probs(ids, mask))
    assert calibrator.config.heads == ("calibrator", "reference")  # the source itself is not touched


def test_a_value_head_binds_to_another_vocabulary(target, tmp_path):
    make(target).save_pretrained(tmp_path)
    fusion = CalibFusion.from_pretrained(tmp_path, tokenizer=make_vocabulary(size=60))
    assert fusion.config.mode == "value"
    scores = torch.randn(2, 60)
    assert not torch.allclose(fusion(torch.randint(3, 60, (2, 5)), scores), scores.log_softmax(-1))


def test_a_second_value_head_replaces_the_first():
    once = make_calibrator().with_value_head(0)
    twice = once.with_value_head(1)
    assert twice.config.heads == once.config.heads
    assert twice.composer.table.shape == once.composer.table.shape


# ---- decoding


class TestDecoding:
    @pytest.mark.parametrize(
        "options",
        [{}, {"do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}],
        ids=["greedy", "sampling", "beams"],
    )
    def test_cached_decoding_gives_the_tokens_of_recomputation(self, target, options, tmp_path):
        guide = bind(make(target), tmp_path)
        ids, mask = ids_and_mask()
        inputs, options = {"input_ids": ids, "attention_mask": mask}, {"max_new_tokens": 12, **options}
        fusion = CalibFusion(guide, CONFIG)
        fused = generate(target, inputs, fusion, **options)
        assert torch.equal(fused, generate(target, inputs, _Anew(guide), **options))
        plain = generate(target, inputs, **options)
        assert fused.shape != plain.shape or not torch.equal(fused, plain)
        assert torch.equal(generate(target, inputs, fusion, **options), fused)  # the same object once more

    def test_assisted_decoding_rolls_back(self, target, tmp_path):
        assistant = copy.deepcopy(target)
        with torch.no_grad():
            weight = assistant.lm_head.weight
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight.std() * 0.4)
        guide = bind(make(target), tmp_path)
        inputs = dict(zip(("input_ids", "attention_mask"), ids_and_mask(rows=1), strict=True))
        options = {"assistant_model": assistant, "max_new_tokens": 14}
        fused = generate(target, inputs, CalibFusion(guide, CONFIG), **options)
        assert torch.equal(fused, generate(target, inputs, _Anew(guide), **options))
        assert torch.equal(fused, generate(target, inputs, CalibFusion(guide, CONFIG), max_new_tokens=14))

    def test_a_batch_gives_the_tokens_of_its_rows_one_by_one(self, target, tmp_path):
        guide = bind(make(target), tmp_path)
        ids, mask = ids_and_mask()
        options = {"max_new_tokens": 10, "eos_token_id": None}
        together = generate(target, {"input_ids": ids, "attention_mask": mask}, CalibFusion(guide, CONFIG), **options)
        for row in range(3):
            alone = {"input_ids": ids[row : row + 1, 2 * row :]}
            said = generate(target, alone, CalibFusion(guide, CONFIG), **options)
            assert torch.equal(together[row, 2 * row :], said[0])

    def test_whole_sequences_equal_steps(self, target, tmp_path):
        guide = bind(make(target), tmp_path)
        ids, mask = ids_and_mask()
        with torch.no_grad():
            logits = target(input_ids=ids, attention_mask=mask).logits
        fusion = CalibFusion(guide, CONFIG)
        whole = fusion.fuse_logits(ids, logits, mask)
        for length in (7, 9):
            step = fusion(ids[:, :length], logits[:, length - 1])
            torch.testing.assert_close(whole[:, length - 1], step, atol=1e-4, rtol=1e-4)

    def test_the_recommended_mode_and_strength_are_found(self, target, tmp_path):
        make(target).save_pretrained(tmp_path, fusion={"mode": "value", "alpha": 2.5})
        fusion = CalibFusion.from_pretrained(tmp_path, tokenizer=make_vocabulary())
        assert (fusion.config.mode, fusion.config.alpha) == ("value", 2.5)
        explicit = CalibFusion.from_pretrained(tmp_path, tokenizer=make_vocabulary(), mode="value", alpha=0.5)
        assert (explicit.config.mode, explicit.config.alpha) == ("value", 0.5)


class _Anew:
    """The fusion without a memory."""

    def __init__(self, guide):
        self.guide = guide

    def __call__(self, input_ids, scores):
        return CalibFusion(self.guide, CONFIG)(input_ids, scores)


# ---- training


def labelled(count=40, length=10, prompt=3, seed=0):
    """Rows whose label hangs on one word of the continuation."""
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[::2, 5] = 7
    return SampleSet(
        ids,
        lengths=torch.full((count,), length),
        prompt_lengths=torch.full((count,), prompt),
        log_weights=torch.zeros(count),
        satisfaction=torch.tensor([0.0, 1.0]).repeat(count // 2),
    )


QUICK = AuxiliaryTrainingConfig(steps=6, batch_size=8, learning_rate=3e-3)


def test_training_lowers_the_loss_and_reports_figures(target):
    auxiliary = make(softened(copy.deepcopy(target), 0.2), strength=0.0)
    config = AuxiliaryTrainingConfig(steps=60, batch_size=20, learning_rate=1e-2, held_out_share=0.0)
    figures = train_auxiliary(auxiliary, target, labelled(), config, show_progress=False)
    assert figures["samples"] == 40
    assert figures["left_out"] == 0
    assert figures["effective_samples"] == pytest.approx(40, abs=1e-3)
    assert figures["mean_satisfaction"] == pytest.approx(0.5)
    assert figures["held_out_bce"] < figures["prior_bce"] - 0.05
    assert 0 <= figures["consistency_gap"] < 0.5


def test_unlabelled_samples_are_counted_and_left_out(target):
    samples = labelled()
    samples.satisfaction[:7] = torch.nan
    figures = train_auxiliary(make(target), target, samples, QUICK, show_progress=False)
    assert (figures["samples"], figures["left_out"]) == (33, 7)
    assert all(math.isfinite(value) for value in figures.values())


def test_only_the_value_head_of_a_calibrator_learns(target):
    auxiliary = make(target, strength=0.0)
    before = {name: tensor.clone() for name, tensor in auxiliary.state_dict().items()}
    train_auxiliary(auxiliary, target, labelled(), QUICK, show_progress=False)
    changed = {name for name, tensor in auxiliary.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("heads.value" in name or name.startswith(("head.", "bias_table")) for name in changed)


def test_training_does_not_touch_the_base(target):
    base = copy.deepcopy(target)
    train_auxiliary(make(base), base, labelled(), QUICK, show_progress=False)
    for one, other in zip(base.parameters(), target.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_stopped_training_goes_on_to_the_same_weights(target, tmp_path):
    class Stop(Exception):
        pass

    whole, stopped = make(target), make(target)
    train_auxiliary(whole, target, labelled(), QUICK, show_progress=False)
    resumed = copy.deepcopy(stopped)
    place, calls = tmp_path / "state", []
    original = stopped.of_next

    def fails_later(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise Stop
        return original(*arguments)

    stopped.of_next = fails_later
    with pytest.raises(Stop):
        train_auxiliary(stopped, target, labelled(), QUICK, folder=place, save_every=2, show_progress=False)
    train_auxiliary(resumed, target, labelled(), QUICK, folder=place, save_every=2, show_progress=False)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert [path.name for path in place.iterdir()] == ["checkpoint"]


def test_a_checkpoint_of_another_model(target, tmp_path):
    place = tmp_path / "state"
    train_auxiliary(make(target), target, labelled(), QUICK, folder=place, show_progress=False)
    other = make(target, calibrator=make_calibrator(token_width=20))
    with pytest.raises(CheckpointError, match="made with another auxiliary model"):
        train_auxiliary(other, target, labelled(), QUICK, folder=place, show_progress=False)


def test_no_label_at_all(target):
    samples = labelled()
    samples.satisfaction.fill_(torch.nan)
    with pytest.raises(ScorerError, match="None of the 40 samples has a label"):
        train_auxiliary(make(target), target, samples, QUICK, show_progress=False)


def test_too_few_samples(target):
    config = AuxiliaryTrainingConfig(steps=1, held_out_share=0.9)
    one = labelled().rows(torch.tensor([0]))
    train_auxiliary(make(target), target, one, config, show_progress=False)  # one is enough
    with pytest.raises(DataError, match="needs samples to learn from, got none"):
        train_auxiliary(make(target), target, _nothing(), config, show_progress=False)


def _nothing():
    samples = labelled().rows(torch.tensor([0, 1]))
    samples.satisfaction[:] = 1.0
    return SampleSet(
        samples.input_ids[:0],
        lengths=samples.lengths[:0],
        prompt_lengths=samples.prompt_lengths[:0],
        log_weights=samples.log_weights[:0],
        satisfaction=samples.satisfaction[:0],
    )


def test_a_rate_that_diverges(target):
    config = AuxiliaryTrainingConfig(steps=30, batch_size=8, learning_rate=1e18)
    with pytest.raises(InputError, match="training has diverged. Choose a lower learning rate"):
        train_auxiliary(make(target), target, labelled(), config, show_progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"consistency_weight": -1.0}, "consistency_weight must be at least 0"),
        ({"consistency_share": 0.0}, "consistency_share must be above 0"),
        ({"held_out_share": 1.0}, "held_out_share must be at least 0 and below 1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        AuxiliaryTrainingConfig(**options)


# ---- making one


def test_a_tokenizer_of_another_model(tiny_llama):
    with pytest.raises(VocabularyMismatchError, match="has 96 ids, but the target scores only 50"):
        make_auxiliary_model(tiny_llama(50), make_vocabulary(), seed=0)


def test_files_that_are_missing_newer_or_damaged(target, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_auxiliary_model(tmp_path, target, make_vocabulary())
    make(target).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(CheckpointFormatError, match="newer calibfuse"):
        load_auxiliary_model(tmp_path, target, make_vocabulary())


def test_the_bundled_calibrator_is_the_default(target):
    auxiliary = make_auxiliary_model(target, make_vocabulary(), seed=0)
    assert isinstance(auxiliary.calibrator, UniversalCalibrator)
    assert auxiliary.calibrator.config.heads == ("calibrator", "reference", "value")


# ---- small functions


def test_log_one_minus_exp_is_precise_at_both_ends():
    values = torch.tensor([-1e-6, -0.1, -0.6931, -5.0, -40.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(float(value))) for value in values]
    torch.testing.assert_close(log_one_minus_exp(values), torch.tensor(expected, dtype=torch.float64))
    values.requires_grad_(True)
    log_one_minus_exp(values).sum().backward()
    assert bool(values.grad.isfinite().all())


def test_bernoulli_figures_by_hand():
    """BCE(1/4 under R = 1/2) = log 2; KL(1/2 || 1/4) = (log 2 + log(2/3)) / 2."""
    quarter, half = torch.tensor(0.25), torch.tensor(0.5)
    assert float(bernoulli_cross_entropy(quarter, half.log())) == pytest.approx(math.log(2))
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(bernoulli_kl(half.log(), quarter.log())) == pytest.approx(expected, abs=1e-6)
    assert float(bernoulli_kl(half.log(), half.log())) == pytest.approx(0, abs=1e-7)


def test_weights_have_mean_one():
    weights = normalised_weights(torch.tensor([-1000.0, -1000.0 + math.log(3.0)]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5]))
