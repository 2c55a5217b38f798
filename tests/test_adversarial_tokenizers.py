"""Tokenizers at their worst, through `Calibrator.bind` and `CalibFusion.from_pretrained`: right, or one sentence.

A right answer: a distribution over exactly the ids of the scores, that a generation can go on from.
"""

import json
import math
import warnings

import pytest
import tokenizers
import torch
from tiny_calibrators import make_calibrator
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from calibfuse import CalibFusion, Vocabulary
from calibfuse.errors import CalibfuseError, VocabularyError, VocabularyMismatchError

OPTIONS = {"alpha": 2.0, "one_sided": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrator")
    make_calibrator().save_pretrained(folder, dtype=torch.float32)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))


def word_level(vocab, special=()):
    """A tokenizer with exactly these strings and ids."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=None))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def byte_level(extra=()):
    """GPT-2-like: the 256 bytes, then the given byte strings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *extra])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check_works(checkpoint, tokenizer, *, head_width=None, prompt=(1, 2)):
    """Fused log-probabilities are a distribution over the head, and a real generation with them goes on."""
    fusion = CalibFusion.from_pretrained(checkpoint, tokenizer=tokenizer, **OPTIONS)
    size = fusion.guide.target_vocab_size
    width = head_width or size
    ids = torch.tensor([[min(token, width - 1) for token in prompt]])
    scores = torch.randn(1, width, generator=torch.Generator().manual_seed(0))
    fused = fusion(ids, scores)
    assert fused.shape == (1, width)
    assert not fused.isnan().any()
    torch.testing.assert_close(fused.logsumexp(-1), torch.zeros(1), atol=1e-4, rtol=0)
    log_probs = fusion.guide.log_probs(ids.clamp(max=size - 1))
    torch.testing.assert_close(log_probs.logsumexp(-1), torch.zeros_like(ids).float(), atol=1e-4, rtol=0)
    config = GPT2Config(vocab_size=width, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for options in ({"do_sample": True}, {"num_beams": 2}):
            made = model.generate(
                ids, max_new_tokens=5, min_new_tokens=5, pad_token_id=0, logits_processor=[fusion], **options
            )
            assert made.shape == (1, ids.shape[1] + 5)
    return fusion


def refusal(checkpoint, tokenizer, kind=VocabularyError):
    """The message of the error with which both doors are closed."""
    messages = []
    for door in (
        lambda: make_calibrator().bind(tokenizer),
        lambda: CalibFusion.from_pretrained(checkpoint, tokenizer=tokenizer, **OPTIONS),
    ):
        with pytest.raises(kind) as caught:
            door()
        assert isinstance(caught.value, CalibfuseError)
        messages.append(str(caught.value))
        assert "\n" not in messages[-1]
        assert messages[-1].endswith(".")
    assert messages[0] == messages[1]
    return messages[0]


class TestRight:
    """These have an answer."""

    def test_an_empty_string_token_is_never_moved(self, checkpoint):
        fusion = check_works(checkpoint, word_level({"": 0, "a": 1, "b": 2, "ab": 3}))
        assert fusion.guide.covers(torch.arange(4)).tolist() == [False, True, True, True]
        scores = torch.zeros(1, 4)
        fused = fusion(torch.tensor([[1, 3]]), scores)
        # what fusion may not move keeps its probability
        assert fused[0, 0].exp().item() == pytest.approx(0.25, abs=1e-5)

    @pytest.mark.parametrize("mark", ["<｜User｜>", "<|12.54|>", "<tool_call>", "[INST]"])
    def test_a_mark_without_the_special_flag_keeps_its_probability(self, checkpoint, mark):
        tokenizer = byte_level()
        tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False), "word"])
        fusion = check_works(checkpoint, tokenizer)
        scores = torch.randn(1, 258, generator=torch.Generator().manual_seed(0))
        scores[0, 256] = math.log(4) + scores[0, [*range(256), 257]].logsumexp(0)  # probability 0.8
        fused = fusion(torch.tensor([list(b"you are")]), scores)
        assert fused[0, 256].exp().item() == pytest.approx(0.8, abs=1e-5)
        assert (fused - scores.log_softmax(-1)).abs().max() > 0.01, "words are moved"
        assert fusion.guide.covers(torch.tensor([256, 257])).tolist() == [False, True]

    def test_single_bytes_only(self, checkpoint):
        fusion = check_works(checkpoint, byte_level())
        assert {len(fusion.guide.vocabulary.token_bytes(i)) for i in range(256)} == {1}
        assert fusion.guide.coverage == 1.0

    def test_bytes_that_are_no_valid_utf_8(self, checkpoint):
        strings = [bytes([byte]) for byte in range(256)] + [b"\xff\xfe", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\x80"]
        fusion = check_works(checkpoint, Vocabulary.from_byte_strings(strings))
        assert fusion.guide.coverage == 1.0
        fusion = check_works(checkpoint, byte_level(["ÿþ", "âĤ", "Ã"]))
        assert fusion.guide.vocabulary.token_bytes(256) == b"\xff\xfe"

    def test_holes_in_the_ids(self, checkpoint):
        fusion = check_works(checkpoint, word_level({"a": 0, "b": 3, "ab": 7, "c": 40}), prompt=(0, 3))
        assert fusion.guide.target_vocab_size == 41
        assert fusion.guide.covers(torch.tensor([0, 1, 2, 3, 7, 40])).tolist() == [True, False, False, True, True, True]

    @pytest.mark.parametrize("width", [200, 256, 300])
    def test_a_head_narrower_or_wider_than_the_vocabulary(self, checkpoint, width):
        check_works(checkpoint, byte_level(), head_width=width)

    def test_generated_ids_beyond_the_tokenizer_are_read_as_boundaries(self, checkpoint):
        fusion = check_works(checkpoint, byte_level(), head_width=300, prompt=(1, 299))
        with_filler = fusion(torch.tensor([[299, 5, 6]]), torch.zeros(1, 300))
        without = fusion(torch.tensor([[5, 6]]), torch.zeros(1, 300))
        torch.testing.assert_close(with_filler, without)

    def test_three_hundred_thousand_tokens(self, checkpoint):
        vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        for number in range(300_000 - len(vocab)):
            vocab[f"Ġw{number}"] = len(vocab)
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
        tokenizer.decoder = decoders.ByteLevel()
        fusion = CalibFusion.from_pretrained(checkpoint, tokenizer=tokenizer, **OPTIONS)
        assert fusion.guide.target_vocab_size == 300_000
        fused = fusion(torch.tensor([[5, 299_999]]), torch.zeros(1, 300_000))
        assert fused.logsumexp(-1).item() == pytest.approx(0.0, abs=1e-3)
        assert fusion.guide.vocabulary.token_bytes(299_999) == b" w299743"

    def test_two_ids_with_one_string_keep_the_mass_of_the_string(self, checkpoint):
        twice = [None, b" a", b"b", b" a", b" a"]
        fusion = check_works(checkpoint, Vocabulary.from_byte_strings(twice))
        said = fusion.guide.log_probs(torch.tensor([[2]])).exp()[0, 0]
        single = (
            make_calibrator().bind(Vocabulary.from_byte_strings(twice[:3])).log_probs(torch.tensor([[2]])).exp()[0, 0]
        )
        assert said[[1, 3, 4]].sum().item() == pytest.approx(single[1].item(), abs=1e-6)
        assert said[1].item() == pytest.approx(said[4].item(), abs=1e-7)

    def test_a_token_of_a_thousand_characters(self, checkpoint):
        check_works(checkpoint, word_level({"a" * 1000: 0, "b": 1, "\0": 2, "\u2028": 3}))

    def test_a_transformers_tokenizer_around_them(self, checkpoint):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(["Ġthe"]), eos_token="<end>")
        fusion = check_works(checkpoint, tokenizer)
        assert not fusion.guide.covers(torch.tensor([tokenizer.eos_token_id])).item()


class TestRefused:
    """These have none: one sentence says what is wrong."""

    def test_special_tokens_only(self, checkpoint):
        tokenizer = word_level({"<s>": 0, "</s>": 1, "<pad>": 2}, special=["<s>", "</s>", "<pad>"])
        assert "at least 2 tokens with text" in refusal(checkpoint, tokenizer)

    def test_one_token(self, checkpoint):
        assert "has 1 among 1 ids" in refusal(checkpoint, word_level({"a": 0}))

    def test_nothing_at_all(self, checkpoint):
        assert "at least 2 tokens" in refusal(checkpoint, tokenizers.Tokenizer(models.BPE()))

    def test_lone_surrogates(self, checkpoint, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1, "\ud800": 2}}}))
        assert "lone surrogate" in refusal(checkpoint, path)

    def test_an_id_of_four_billion(self, checkpoint, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 4_000_000_000}}}))
        assert "4000000000" in refusal(checkpoint, path)

    def test_something_else(self, checkpoint):
        assert "Expected a transformers tokenizer" in refusal(checkpoint, object())

    def test_prompt_ids_that_neither_head_nor_tokenizer_has(self, checkpoint):
        fusion = CalibFusion.from_pretrained(checkpoint, tokenizer=byte_level(), **OPTIONS)
        with pytest.raises(VocabularyMismatchError) as caught:
            fusion(torch.tensor([[1, 999]]), torch.zeros(1, 256))
        assert "999" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_scores_of_a_vocabulary_with_infinite_scores_stay_so(checkpoint):
    fusion = CalibFusion.from_pretrained(checkpoint, tokenizer=byte_level(), **OPTIONS)
    scores = torch.zeros(1, 256)
    scores[0, 5:] = -math.inf
    fused = fusion(torch.tensor([[1, 2]]), scores)
    assert fused[0, 5:].isneginf().all()
    assert fused[0, :5].exp().sum().item() == pytest.approx(1.0, abs=1e-5)
