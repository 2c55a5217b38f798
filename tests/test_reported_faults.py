"""Small inputs on which comparable libraries, and an earlier state of this one, went wrong."""

import asyncio
import copy
import json
import threading
import types

import pytest
import tokenizers
import torch
import transformers
from tiny_calibrators import make_bound, make_calibrator, make_vocabulary

from calibfuse.calibrator.word_bias import read_words
from calibfuse.errors import FusionNotAppliedError, InputError, VocabularyMismatchError
from calibfuse.evaluation import Prompt, evaluate
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion

SIZE = 96
CONFIG = FusionConfig(alpha=2.0, candidates=30, mass_to_others=True)


@pytest.fixture(scope="module")
def bound():
    return make_bound(strength=2.0)


def random_ids(rows=2, length=12, seed=0):
    return torch.randint(3, SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_scores(rows=2, width=SIZE, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def generation(fusion, seed, steps=25):
    """The results of some steps with texts of one's own."""
    ids = random_ids(length=steps + 3, seed=seed)
    return [fusion(ids[:, :length], random_scores(seed=seed)) for length in range(3, steps + 3)]


def test_one_object_in_several_threads(bound):
    fusion = CalibFusion(bound, CONFIG)
    expected = [generation(CalibFusion(bound, CONFIG), seed) for seed in range(4)]
    results, errors = {}, []

    def work(seed):
        try:
            results[seed] = [generation(fusion, seed) for _ in range(4)]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, rounds in results.items():
        for steps in rounds:
            for got, wanted in zip(steps, expected[seed], strict=True):
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_workers_of_asyncio_in_turns(bound):
    fusion = CalibFusion(bound, CONFIG)

    async def work(seed):
        ids, results = random_ids(length=10, seed=seed), []
        for length in range(3, 10):
            results.append(fusion(ids[:, :length], random_scores(seed=seed)))
            await asyncio.sleep(0)
        return results

    async def together():
        return await asyncio.gather(*(work(seed) for seed in range(3)))

    for seed, results in enumerate(asyncio.run(together())):
        for length, got in enumerate(results, 3):
            wanted = CalibFusion(bound, CONFIG)(random_ids(length=10, seed=seed)[:, :length], random_scores(seed=seed))
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy])
def test_copies_follow_generations_of_their_own(bound, make_copy):
    fusion = CalibFusion(bound, CONFIG)
    ids = random_ids()
    fusion(ids[:, :5], random_scores())
    other = make_copy(fusion)
    assert other._rows(other.guide).session is not fusion._rows(fusion.guide).session
    other(random_ids(seed=7), random_scores())
    held = fusion._rows(fusion.guide)._rows
    assert held is not None
    assert held.length == 5, "the copy's generation left the original's alone"
    assert (fusion.report().steps, other.report().steps) == (2, 2)


def test_rows_padded_on_the_right_are_what_they_are_alone(bound):
    """A mark behind a text is a boundary that the text before it is seen across; neighbours never matter."""
    ids = random_ids()
    ids[1, 8:] = 2
    fusion = CalibFusion(bound, CONFIG)
    together = fusion(ids, random_scores())
    alone = CalibFusion(bound, CONFIG)(ids[1:], random_scores()[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)


def test_ids_and_scores_on_different_devices(bound, monkeypatch):
    """A fake device: ids that must be moved before they meet the scores."""
    moved = []

    class Elsewhere(torch.Tensor):
        def to(self, *arguments, **options):
            moved.append(arguments)
            return self.as_subclass(torch.Tensor).to(*arguments, **options)

    ids, scores = random_ids(), random_scores()
    expected = CalibFusion(bound, CONFIG)(ids, scores)
    torch.testing.assert_close(CalibFusion(bound, CONFIG)(ids.as_subclass(Elsewhere), scores), expected)
    assert moved == [(scores.device,)]


def test_an_offloaded_target_is_no_place_for_the_guide(tmp_path, byte_level_tokenizer, tiny_gpt2, monkeypatch):
    monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))
    make_calibrator().save_pretrained(tmp_path / "calibrator")
    model = tiny_gpt2(byte_level_tokenizer.get_vocab_size()).to("meta")
    fusion = CalibFusion.from_pretrained(tmp_path / "calibrator", tokenizer=byte_level_tokenizer, target=model)
    assert fusion.guide.device.type == "cpu"


def test_scores_of_an_assistant_with_another_tokenizer_pass(bound):
    fusion = CalibFusion(bound, CONFIG, target=target_of(SIZE + 4))
    foreign, ids = random_scores(width=SIZE - 30), random_ids() * 100
    assert torch.equal(fusion(ids, foreign), foreign)
    assert not torch.equal(fusion(random_ids(), random_scores(width=SIZE + 4)), random_scores(width=SIZE + 4))
    with pytest.raises(FusionNotAppliedError), fusion.required():
        fusion(ids, foreign)


@pytest.mark.parametrize("width", [SIZE + 30_000])
def test_a_head_that_cannot_be_the_tokenizers(bound, width):
    scores = random_scores(width=width)
    fusion = CalibFusion(bound, CONFIG)
    with pytest.warns(UserWarning, match=rf"have {width} entries, which cannot be .* tokenizer .words. with 96"):
        assert torch.equal(fusion(random_ids(), scores), scores)
    fusion(random_ids(), scores)  # told once
    with pytest.raises(VocabularyMismatchError, match="Pass the target's own tokenizer"):
        CalibFusion(bound, CONFIG, target=target_of(width))


def test_ids_beyond_scores_that_cannot_be_the_tokenizers(byte_level_tokenizer):
    guide = make_calibrator().bind(byte_level_tokenizer, use_disk_cache=False)
    with pytest.raises(VocabularyMismatchError, match="have 7 entries.*The ids lie beyond them"):
        CalibFusion(guide, CONFIG)(torch.tensor([[50, 60]]), torch.zeros(1, 7))


def test_a_tokenizer_that_is_not_the_targets_is_told(tmp_path, byte_level_tokenizer, wrap_tokenizer, tiny_gpt2):
    """Of the same size, so that no width tells: the ids mean other bytes."""
    size = byte_level_tokenizer.get_vocab_size()
    wrap_tokenizer(byte_level_tokenizer).save_pretrained(tmp_path / "target")
    tiny_gpt2(size).save_pretrained(tmp_path / "target")
    target = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "target")
    CalibFusion.from_pretrained(tokenizer=byte_level_tokenizer, target=target)
    content = json.loads(byte_level_tokenizer.to_str())
    pieces = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(reversed(pieces), pieces.values(), strict=True))
    other = tokenizers.Tokenizer.from_str(json.dumps(content))
    with pytest.warns(UserWarning, match="is not that of the target .*target'.*spell the same ids differently"):
        CalibFusion.from_pretrained(tokenizer=other, target=target)


def target_of(width):
    head = types.SimpleNamespace(weight=torch.zeros(width, 2))
    return types.SimpleNamespace(get_output_embeddings=lambda: head)


def test_a_compiled_decoding_loop(bound):
    fusion, plain = CalibFusion(bound, CONFIG), CalibFusion(bound, CONFIG)

    @torch.compile(backend="eager")
    def step(ids, scores):
        return fusion(ids, scores * 1.0) + 0.0

    ids, scores = random_ids(), random_scores()
    for length in range(4, 8):
        torch.testing.assert_close(step(ids[:, :length], scores), plain(ids[:, :length], scores), atol=1e-4, rtol=1e-4)
    assert fusion.calls == plain.calls == 4


def test_a_prompt_that_is_not_seen_is_told_once(bound):
    fusion = CalibFusion(bound, CONFIG)
    with pytest.warns(UserWarning, match="inputs_embeds.*does not see the prompt"):
        fusion(torch.zeros(2, 0, dtype=torch.int64), random_scores())
    fusion(torch.zeros(2, 0, dtype=torch.int64), random_scores())


class TestSettings:
    """Strength and mode of a fusion that is in use, strings for dtypes and devices."""

    def test_the_strength_may_be_set(self, bound):
        fusion, ids, scores = CalibFusion(bound, CONFIG), random_ids(), random_scores()
        fusion(ids, scores)
        fusion.alpha = 0.0
        assert torch.equal(fusion(ids, scores), scores.log_softmax(-1))
        fusion.alpha = 5.0
        assert (fusion.alpha, fusion.config.mass_to_others) == (5.0, True)
        expected = CalibFusion(bound, FusionConfig(alpha=5.0, candidates=30, mass_to_others=True))(ids, scores)
        torch.testing.assert_close(fusion(ids, scores), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("options", [{"alpha": -1.0}, {"strength": 1.0}, {"mode": "value"}, {"mode": "embedding"}])
    def test_what_cannot_be_leaves_it_as_it_was(self, bound, options):
        fusion = CalibFusion(bound, CONFIG)
        with pytest.raises((InputError, Exception), match=r"alpha must|Unknown fusion|needs the head|target="):
            fusion.set(**options)
        assert fusion.config == CONFIG
        assert fusion.set(mode="geometric").config == FusionConfig(mode="geometric")

    def test_it_says_what_it_is(self, bound):
        text = repr(CalibFusion(bound, CONFIG))
        assert "mode='contrast', alpha=2" in text
        assert "BoundCalibrator" in text
        assert "hidden_temperature" not in text

    def test_names_of_dtypes_and_devices(self):
        calibrator, vocabulary = make_calibrator(), make_vocabulary()
        bound = calibrator.bind(vocabulary, dtype="bfloat16", device="cpu", use_disk_cache=False)
        assert bound.vectors.dtype == torch.bfloat16
        with pytest.raises(InputError, match="dtype must be one of torch's.*'double8'"):
            calibrator.bind(vocabulary, dtype="double8", use_disk_cache=False)
        with pytest.raises(InputError, match="device must be one of torch's.*'foo'"):
            calibrator.bind(vocabulary, device="foo", use_disk_cache=False)

    def test_a_target_is_a_model_or_its_name(self, tmp_path, byte_level_tokenizer):
        byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
        for target in (tmp_path, str(tmp_path)):
            fusion = CalibFusion.from_pretrained(target=target)
            assert fusion.guide.target_vocab_size == byte_level_tokenizer.get_vocab_size()
        with pytest.raises(InputError, match="target= must be the model itself, its name or its path"):
            CalibFusion.from_pretrained(tokenizer="gpt2", target=object())

    def test_a_mistyped_option_is_refused(self, bound):
        fusion = CalibFusion(bound, CONFIG)
        for name in ("alhpa", "margin"):
            with pytest.raises(AttributeError, match=f"no attribute '{name}' to set; options of the fusion are set by"):
                setattr(fusion, name, 3)
        fusion.on_step = print
        assert fusion.config == CONFIG

    def test_the_first_argument_is_the_calibrator(self):
        with pytest.raises(InputError, match="a tokenizer goes to tokenizer="):
            CalibFusion.from_pretrained(object())

    def test_an_evaluation_takes_prompts_and_a_scorer(self, tmp_path):
        with pytest.raises(InputError, match="Expected prompts as Prompt"):
            evaluate(None, [], ["text"], None, tmp_path)
        with pytest.raises(InputError, match="Expected a scorer"):
            evaluate(None, [], [Prompt("1", "text")], "bundled", tmp_path)


class TestWords:
    """Words of one's own."""

    def test_a_word_is_lowered_and_a_name_protected(self):
        bound = make_bound(words={})
        ids, scores = random_ids(), random_scores()
        word = next(token for token in range(SIZE) if bound.vocabulary.token_bytes(token) == b" c")
        config = FusionConfig(alpha=1.0, candidates=0, max_shift=100.0, one_sided=False)
        before = CalibFusion(bound, config)(ids, scores)
        fusion = CalibFusion(bound, config)
        assert fusion.add_words(["C"]).protect_names(["d"]) is fusion
        after = fusion(ids, scores)
        assert (after[:, word] < before[:, word] - 1.0).all()
        assert fusion.guide.calibrator.config.words == {"c": -6.0, "d": 1.0}
        assert bound.calibrator.config.words == {}, "the guide that was given is as it was"
        with pytest.raises(InputError, match="lower-case words of a to z"):
            fusion.add_words(["two words"])
        with pytest.raises(InputError, match="words as strings"):
            fusion.add_words([3])
        assert fusion.add_words({"darn": -2.0}).guide.calibrator.config.words == {"c": -6.0, "d": 1.0, "darn": -2.0}

    def test_vectors_keep_their_dtype(self):
        bound = make_calibrator(words={}).bind(make_vocabulary(SIZE), dtype="bfloat16", use_disk_cache=False)
        assert CalibFusion(bound, FusionConfig()).add_words("darn").guide.vectors.dtype == torch.bfloat16

    def test_one_word_alone_is_that_word_and_not_its_letters(self):
        fusion = CalibFusion(make_bound(words={}), FusionConfig()).add_words("darn")
        assert fusion.guide.calibrator.config.words == {"darn": -6.0}

    def test_words_from_a_file(self, tmp_path):
        (tmp_path / "words.txt").write_text("# rude\nDamn\nheck -2.5  # mildly\n\nscunthorpe 1\n")
        assert read_words(tmp_path / "words.txt") == {"damn": -6.0, "heck": -2.5, "scunthorpe": 1.0}
        (tmp_path / "words.txt").write_text("one two three\n")
        with pytest.raises(InputError, match="in line 1 of"):
            read_words(tmp_path / "words.txt")
        with pytest.raises(InputError, match="Cannot read words"):
            read_words(tmp_path / "missing.txt")
