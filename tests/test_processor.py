"""CalibFusion as an object: the protocol's edges, bad input, its life over several calls."""

import copy
import inspect
import math
import warnings

import pytest
import torch
import transformers
from tiny_calibrators import BOS, PAD, make_bound, make_calibrator, make_vocabulary

from calibfuse import processor as processor_module
from calibfuse.errors import (
    CheckpointError,
    FusionNotAppliedError,
    InputError,
    MissingHeadError,
    VocabularyError,
    VocabularyMismatchError,
)
from calibfuse.fusion import FusionConfig, fuse, recommended_config
from calibfuse.guide import Guide, GuideSession, NextTokenScores
from calibfuse.processor import CalibFusion

SIZE = 96
CONFIG = FusionConfig(alpha=2.0, candidates=30)


@pytest.fixture(scope="module")
def bound():
    return make_bound(strength=2.0)


@pytest.fixture
def fusion(bound):
    return CalibFusion(bound, CONFIG)


def random_ids(rows=2, length=6, seed=0):
    return torch.randint(3, SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_scores(rows=2, width=SIZE, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


class TestOneCall:
    """What a single call promises."""

    def test_is_the_fusion_with_the_calibrators_distributions(self, bound, fusion):
        ids, scores = random_ids(), random_scores()
        config = FusionConfig(alpha=2.0, candidates=0)
        heads = {"calibrator": bound.log_probs(ids)[:, -1], "reference": bound.reference_log_probs(ids)[:, -1]}
        expected = fuse(scores, lambda head, _: heads[head], bound.covers, config, protected=bound.protected)
        result = CalibFusion(bound, config)(ids, scores)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)

    def test_candidates_only_equal_the_full_head(self, bound):
        """With as many candidates as tokens, both ways of evaluating the heads do the same work."""
        ids, scores = random_ids(), random_scores()
        for mode, alpha in (("contrast", 2.0), ("geometric", 0.5), ("blend", 0.5)):
            full = CalibFusion(bound, FusionConfig(mode=mode, alpha=alpha, candidates=0))(ids, scores)
            scores_with_excluded = torch.cat([scores, torch.full((2, 1), -math.inf)], dim=1)
            some = CalibFusion(bound, FusionConfig(mode=mode, alpha=alpha, candidates=SIZE))(ids, scores_with_excluded)
            torch.testing.assert_close(some[:, :SIZE], full, atol=1e-4, rtol=1e-4)

    def test_inputs_are_not_written_to_and_the_result_is_new(self, fusion):
        ids, scores = random_ids(), random_scores()
        ids_before, scores_before = ids.clone(), scores.clone()
        result = fusion(ids, scores)
        result.add_(1.0)
        assert torch.equal(ids, ids_before)
        assert torch.equal(scores, scores_before)
        again = fusion(ids, scores)
        torch.testing.assert_close(again, result - 1.0)

    @pytest.mark.parametrize("alpha", [0.0, 2.0])
    def test_normalised_and_excluded_tokens_stay_excluded(self, bound, alpha):
        scores = random_scores()
        scores[:, ::3] = -math.inf
        result = CalibFusion(bound, FusionConfig(alpha=alpha))(random_ids(), scores)
        assert torch.equal(result == -math.inf, scores == -math.inf)
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)

    def test_logits_and_log_probabilities_give_the_same(self, fusion):
        ids, scores = random_ids(), random_scores()
        torch.testing.assert_close(fusion(ids, scores), fusion(ids, scores.log_softmax(-1)), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_scores(self, fusion, dtype):
        ids, scores = random_ids(), random_scores().to(dtype)
        result = fusion(ids, scores)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, fusion(ids, scores.float()))

    def test_special_tokens_are_never_moved(self, bound, fusion):
        ids, scores = random_ids(), random_scores()
        scores[:, :3] = 5.0  # surely among the candidates
        result = fusion(ids, scores)
        assert torch.equal(result[:, :3], scores.log_softmax(-1)[:, :3])

    def test_masked_scores_at_the_lowest_number_instead_of_minus_infinity(self, fusion):
        ids, scores = random_ids(), random_scores()
        scores[:, 10:90] = torch.finfo(torch.float32).min
        result = fusion(ids, scores)
        assert result.isfinite().all()
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
        assert (result[:, 10:90] < -1e30).all()

    def test_no_context_at_all(self, bound, fusion):
        empty, scores = torch.zeros(2, 0, dtype=torch.int64), random_scores()
        result = fusion(empty, scores)
        torch.testing.assert_close(result, fusion(torch.full((2, 3), BOS), scores), atol=1e-4, rtol=1e-4)

    def test_no_rows(self, fusion):
        result = fusion(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, SIZE))
        assert result.shape == (0, SIZE)

    @pytest.mark.parametrize("width", [SIZE - 20, SIZE - 1, SIZE + 1, SIZE + 32])
    @pytest.mark.parametrize("candidates", [0, 30])
    def test_a_model_head_wider_or_narrower_than_the_tokenizer(self, bound, width, candidates):
        ids, scores = random_ids() % (SIZE - 20), random_scores(width=width)
        result = CalibFusion(bound, FusionConfig(alpha=2.0, candidates=candidates))(ids, scores)
        assert result.shape == (2, width)
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
        assert torch.equal(result[:, SIZE:], scores.log_softmax(-1)[:, SIZE:])

    def test_ids_between_tokenizer_and_head_count_as_special(self, bound, fusion):
        """A padded head: ids without a token can be generated by a random model, and read back."""
        ids, wide = random_ids(), random_scores(width=SIZE + 8)
        ids[:, 2] = SIZE + 3
        special = ids.clone()
        special[:, 2] = PAD
        torch.testing.assert_close(fusion(ids, wide), fusion(special, wide))

    def test_prompt_ids_beyond_the_head_but_in_the_tokenizer(self, fusion):
        """As image marks are, in some models whose output head leaves them out."""
        ids, narrow = random_ids(), random_scores(width=SIZE - 10)
        ids[:, 1] = SIZE - 2
        assert fusion(ids, narrow).shape == (2, SIZE - 10)


class TestBadInput:
    """One clear sentence each."""

    @pytest.mark.parametrize("alpha", [0.0, 2.0])
    @pytest.mark.parametrize(
        ("value", "message"),
        [(math.nan, r"scores hold nan or \+inf"), (math.inf, r"scores hold nan or \+inf")],
    )
    def test_nan_and_infinity(self, bound, alpha, value, message):
        scores = random_scores()
        scores[1, 5] = value
        with pytest.raises(InputError, match=message):
            CalibFusion(bound, FusionConfig(alpha=alpha))(random_ids(), scores)

    @pytest.mark.parametrize("alpha", [0.0, 2.0])
    def test_a_row_without_any_choice_is_left_as_it_is(self, bound, alpha):
        """Dead beams of a constraint; plain generate() goes on, too."""
        scores, ids = random_scores(3), random_ids(3)
        scores[1] = -math.inf
        result = CalibFusion(bound, FusionConfig(alpha=alpha))(ids, scores)
        assert (result[1] == -math.inf).all()
        others = CalibFusion(bound, FusionConfig(alpha=alpha))(ids[[0, 2]], scores[[0, 2]])
        torch.testing.assert_close(result[[0, 2]], others, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("alpha", [0.0, 2.0])
    @pytest.mark.parametrize("wrong", [-1, -100_000, SIZE, 10**9])
    @pytest.mark.parametrize("position", [0, -1])
    def test_ids_outside_the_vocabulary(self, bound, alpha, wrong, position):
        ids = random_ids()
        ids[1, position] = wrong
        with pytest.raises(VocabularyMismatchError, match=f"input_ids hold {wrong}, outside the 96 ids of the scores"):
            CalibFusion(bound, FusionConfig(alpha=alpha))(ids, random_scores())

    @pytest.mark.parametrize(
        ("ids", "scores"),
        [((6,), (2, SIZE)), ((2, 6), (SIZE,)), ((2, 6), (3, SIZE)), ((2, 6), (2, 1, SIZE)), ((2, 3, 4), (2, SIZE))],
    )
    def test_shapes(self, fusion, ids, scores):
        with pytest.raises(VocabularyMismatchError, match=r"Expected input_ids \[rows, length\] and scores"):
            fusion(torch.ones(ids, dtype=torch.int64), torch.zeros(scores))

    def test_works_again_after_an_error(self, bound):
        fusion, ids, scores = CalibFusion(bound, CONFIG), random_ids(), random_scores()
        bad = scores.clone()
        bad[0, 0] = math.nan
        with pytest.raises(InputError):
            fusion(ids, bad)
        wrong = ids.clone()
        wrong[0, -1] = -5
        with pytest.raises(VocabularyMismatchError):
            fusion(wrong, scores)
        torch.testing.assert_close(fusion(ids, scores), CalibFusion(bound, CONFIG)(ids, scores), atol=1e-4, rtol=1e-4)

    def test_missing_head(self):
        bound = make_bound(heads=("calibrator",))
        with pytest.raises(
            MissingHeadError, match="Mode 'contrast' needs the head 'reference', but .* only 'calibrator'"
        ):
            CalibFusion(bound)
        with pytest.raises(MissingHeadError, match="Mode 'value' needs the head 'value'"):
            CalibFusion(bound, FusionConfig(mode="value"))
        CalibFusion(bound, FusionConfig(mode="geometric", alpha=0.5))

    def test_the_value_mode_with_a_value_head(self):
        bound = make_bound(heads=("calibrator", "value"))
        fusion = CalibFusion(bound, FusionConfig(mode="value", alpha=1.0))
        result = fusion(random_ids(), random_scores())
        torch.testing.assert_close(result.logsumexp(-1), torch.zeros(2), atol=1e-5, rtol=0)
        assert not torch.allclose(result, random_scores().log_softmax(-1))


class TestLife:
    """State, counting, reset, required."""

    def test_calls_are_counted(self, fusion):
        assert fusion.calls == 0
        fusion(random_ids(), random_scores())
        fusion(random_ids(), random_scores())
        assert fusion.calls == 2
        fusion.fuse_logits(random_ids(), torch.randn(2, 6, SIZE))
        assert fusion.calls == 3

    def test_alpha_zero_counts_as_well(self, bound):
        fusion = CalibFusion(bound, FusionConfig(alpha=0.0))
        with fusion.required():
            fusion(random_ids(), random_scores())
        assert fusion.calls == 1

    def test_reset_changes_nothing_but_memory(self, fusion):
        ids, scores = random_ids(), random_scores()
        before = fusion(ids, scores)
        fusion.reset()
        assert fusion._rows(fusion.guide)._rows is None
        torch.testing.assert_close(fusion(ids, scores), before)

    def test_required_raises_without_a_call(self, fusion):
        fusion(random_ids(), random_scores())  # calls before the block do not count
        with pytest.raises(FusionNotAppliedError, match="without one step of CalibFusion"), fusion.required():
            pass

    def test_required_lets_other_errors_through(self, fusion):
        with pytest.raises(KeyError), fusion.required():
            raise KeyError("something else went wrong")

    def test_required_gives_the_processor(self, fusion):
        with fusion.required() as same:
            same(random_ids(), random_scores())
        assert same is fusion

    def test_is_a_logits_processor_with_two_arguments(self, fusion):
        assert isinstance(fusion, transformers.LogitsProcessor)
        assert list(inspect.signature(fusion.__call__).parameters) == ["input_ids", "scores"]

    def test_what_the_caller_switched_on_does_not_matter(self, bound):
        """Inference mode, autocast and neither take turns; none changes a number, none breaks the cache."""
        ids, scores = random_ids(length=12), random_scores()
        modes = (
            torch.inference_mode,
            torch.no_grad,
            lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            torch.enable_grad,
        )
        fusion = CalibFusion(bound, CONFIG)
        for length in range(3, 13):
            with modes[length % 4]():
                result = fusion(ids[:, :length].flip(0) if length > 8 else ids[:, :length], scores)
            expected = CalibFusion(bound, CONFIG)(ids[:, :length].flip(0) if length > 8 else ids[:, :length], scores)
            torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_probs = bound.log_probs(ids)
        torch.testing.assert_close(log_probs, bound.log_probs(ids))

    def test_copies_are_independent(self, bound):
        """What one of them follows afterwards changes neither the calls nor the answers of the other."""
        fusion, fresh = CalibFusion(bound, CONFIG), CalibFusion(bound, CONFIG)
        fusion(random_ids(), random_scores())
        other = copy.deepcopy(fusion)
        for seed in (4, 5):
            other(random_ids(seed=seed), random_scores(seed=seed))
        assert (fusion.calls, other.calls) == (1, 3)
        ids, scores = random_ids(seed=3), random_scores(seed=3)
        torch.testing.assert_close(fusion(ids, scores), fresh(ids, scores))
        other.reset()
        ids = torch.cat([ids, ids[:, :1]], dim=1)
        torch.testing.assert_close(fusion(ids, scores), fresh(ids, scores))

    def test_any_guide_will_do(self):
        """The processor knows the protocol of guides, not our calibrator: here one that always says the same."""

        class Constant(Guide):
            heads = ("calibrator", "reference")
            device = torch.device("cpu")
            vocabulary = make_vocabulary(SIZE)

            def to(self, device):
                return self

            def covers(self, token_ids):
                return torch.ones_like(token_ids, dtype=torch.bool)

            def session(self):
                return Session()

            def read_sequence(self, input_ids, masked):
                return Said()

        class Session(GuideSession):
            def step(self, requests):
                return Said()

            def copy(self, pairs):
                pass

            def drop(self, keys):
                pass

            def reset(self):
                pass

        class Said(NextTokenScores):
            def positions(self, start, stop) -> NextTokenScores:
                return self

            def log_scores(self, head, token_ids=None):
                full = -torch.arange(SIZE).float() * (1.0 if head == "calibrator" else 0.0)
                return full if token_ids is None else full[token_ids]

        result = CalibFusion(Constant(), FusionConfig(alpha=1.0, candidates=0))(random_ids(), random_scores())
        assert result.shape == (2, SIZE)
        assert (result[:, -1] < random_scores().log_softmax(-1)[:, -1]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrator")
    make_calibrator(fusion={"mode": "contrast", "alpha": 1.5, "candidates": 77}).save_pretrained(folder)
    return folder


class TestFromPretrained:
    """Loading, binding and the recommended options."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))

    def test_recommended_options_are_taken(self, folder, byte_level_tokenizer):
        fusion = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer)
        assert (fusion.config.alpha, fusion.config.candidates) == (1.5, 77)
        assert fusion.guide.target_vocab_size == byte_level_tokenizer.get_vocab_size()

    def test_given_options_win(self, folder, byte_level_tokenizer):
        fusion = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer, alpha=0.5, max_shift=2.0)
        assert (fusion.config.alpha, fusion.config.candidates, fusion.config.max_shift) == (0.5, 77, 2.0)

    def test_another_mode_does_not_inherit_the_recommended_alpha(self, folder, byte_level_tokenizer):
        fusion = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer, mode="geometric")
        assert fusion.config.mode == "geometric"
        assert fusion.config.alpha < 1.0
        assert fusion.config.candidates is None  # nor the recommended candidates

    def test_lower_precision(self, folder, byte_level_tokenizer):
        fusion = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer, dtype=torch.bfloat16)
        assert fusion.guide.vectors.dtype == torch.bfloat16

    def test_default_device_and_dtype_of_torch_do_not_matter(self, folder, byte_level_tokenizer, tmp_path, monkeypatch):
        """The meta device stands for an accelerator: any tensor made there by accident has no numbers."""
        monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))
        ids, scores = random_ids(), random_scores(width=500)
        expected = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer)(ids, scores)
        monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "other"))
        torch.set_default_dtype(torch.bfloat16)
        try:
            for _ in range(2):  # freshly bound, and from the disk cache
                with torch.device("meta"):
                    fusion = CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer)
                    assert torch.equal(fusion(ids, scores), expected)
                    assert fusion.guide.log_probs(ids).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)

    def test_local_files_only_holds_for_the_tokenizer_too(self, folder, byte_level_tokenizer, tmp_path, monkeypatch):
        byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
        asked = []

        def download(repository, *, revision=None, local_files_only=False, allow_patterns=None):
            asked.append(local_files_only)
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        for only in (True, False):
            asked.clear()
            fusion = CalibFusion.from_pretrained(folder, tokenizer="some-org/some-model", local_files_only=only)
            assert fusion.guide.target_vocab_size == byte_level_tokenizer.get_vocab_size()
            assert set(asked) == {only}

    def test_the_targets_name_leads_to_its_tokenizer(
        self, folder, byte_level_tokenizer, wrap_tokenizer, tiny_gpt2, tmp_path
    ):
        wrap_tokenizer(byte_level_tokenizer).save_pretrained(tmp_path / "target")
        model = tiny_gpt2(600)
        model.save_pretrained(tmp_path / "target")
        loaded = type(model).from_pretrained(tmp_path / "target")
        fusion = CalibFusion.from_pretrained(folder, target=loaded)
        assert fusion.guide.target_vocab_size == 600

    def test_neither_tokenizer_nor_target(self, folder):
        with pytest.raises(InputError, match="pass tokenizer= .* or target="):
            CalibFusion.from_pretrained(folder)

    def test_a_target_without_a_name(self, folder, tiny_gpt2):
        with pytest.raises(
            InputError, match="GPT2LMHeadModel.* does not know where it was loaded from.*pass tokenizer="
        ):
            CalibFusion.from_pretrained(folder, target=tiny_gpt2(600))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "nonsense"}, "Unknown fusion mode 'nonsense'"),
            ({"alpha": math.nan}, "alpha must be a number"),
            ({"alpha": -1.0}, "alpha must be a number"),
            ({"mode": "blend", "alpha": 2.0}, "to 1 in mode 'blend'"),
            ({"strength": 1.0}, "Unknown fusion options: strength"),
        ],
    )
    def test_bad_options_fail_before_anything_is_loaded(self, options, message, byte_level_tokenizer, monkeypatch):
        def fail(*_, **__):
            raise AssertionError("loaded")

        monkeypatch.setattr(processor_module.Calibrator, "from_pretrained", fail)
        with pytest.raises(InputError, match=message):
            CalibFusion.from_pretrained("nowhere", tokenizer=byte_level_tokenizer, **options)

    def test_no_such_calibrator(self, tmp_path, byte_level_tokenizer):
        with pytest.raises(CheckpointError):
            CalibFusion.from_pretrained(tmp_path / "missing", tokenizer=byte_level_tokenizer)

    def test_no_such_tokenizer(self, folder, tmp_path):
        with pytest.raises(VocabularyError):
            CalibFusion.from_pretrained(folder, tokenizer=str(tmp_path / "missing"))

    def test_a_mode_whose_head_the_calibrator_has_not(self, folder, byte_level_tokenizer):
        with pytest.raises(MissingHeadError, match="needs the head 'value'"):
            CalibFusion.from_pretrained(folder, tokenizer=byte_level_tokenizer, mode="value")


def test_without_a_config_the_guides_recommendation_counts():
    """`CalibFusion(guide)` and `from_pretrained` agree, as do the former and the present name of an option."""
    options = {"alpha": 1.5, "margin": 0.25, "max_shift": 3.5, "hold": True}
    guide = make_bound(fusion=options)
    expected = FusionConfig(alpha=1.5, margin=0.25, max_shift=3.5, mass_to_others=True)
    assert CalibFusion(guide).config == expected
    assert CalibFusion(guide, FusionConfig()).config == FusionConfig()
    assert recommended_config(guide.recommended, {"mass_to_others": False}).mass_to_others is False


def test_blend_is_deprecated(bound):
    with pytest.warns(FutureWarning, match="'blend' is deprecated"):
        CalibFusion(bound, FusionConfig(mode="blend"))


def test_recommendations_belong_to_their_mode():
    recommended = {"mode": "contrast", "alpha": 3.0, "candidates": 50}
    assert recommended_config(recommended, {}) == FusionConfig(alpha=3.0, candidates=50)
    assert recommended_config(recommended, {"alpha": 1.0}) == FusionConfig(alpha=1.0, candidates=50)
    assert recommended_config(recommended, {"mode": "contrast"}).alpha == 3.0
    assert recommended_config(recommended, {"mode": "blend"}) == FusionConfig(mode="blend")
    assert recommended_config({}, {}) == FusionConfig()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    """On a GPU: the guide follows the scores, and the host waits once a step at most."""

    def test_follows_the_scores_device(self, bound):
        fusion, ids, scores = CalibFusion(bound, CONFIG), random_ids(), random_scores()
        expected = CalibFusion(bound, CONFIG)(ids, scores)
        result = fusion(ids.cuda(), scores.cuda())
        assert result.device.type == "cuda"
        torch.testing.assert_close(result.cpu(), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(fusion(ids, scores), expected)  # and back; the bound one stayed where it was
        assert bound.device.type == "cpu"

    @pytest.mark.parametrize("reordered", [False, True])
    def test_one_host_synchronisation_per_step(self, bound, reordered):
        """In warning mode every synchronising call of torch warns once."""
        fusion = CalibFusion(bound, CONFIG)
        ids, scores = random_ids(4, 40).cuda(), random_scores(4).cuda()
        for length in range(6, 20):
            fusion(ids[:, :length], scores)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for length in range(20, 40):
                prefix = ids[:, :length]
                if reordered:
                    prefix = ids[[1, 0, 3, 2], :length] if length % 2 else prefix
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    fusion(prefix, scores)
                waits = [item for item in caught if "synchroniz" in str(item.message)]
                assert len(waits) <= 1, [str(item.message) for item in waits]
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_value_is_read_from_a_device_but_once_a_step(bound, monkeypatch):
    """The same without a GPU: what would wait for one is counted on the CPU."""
    fusion, ids, scores = CalibFusion(bound, CONFIG), random_ids(4, 40), random_scores(4)
    for length in range(6, 20):
        fusion(ids[:, :length], scores)
    reads = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, _original=original, _name=name):
            reads.append(_name)
            return _original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for length in range(20, 40):
        for prefix in (ids[:, :length], ids[[1, 0, 3, 2], :length]):
            reads.clear()
            fusion(prefix, scores)
            assert reads == ["tolist"]
