"""load_scorer: every form of a scorer's name, and every way in which a scorer can fail."""

import sys

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from calibfuse.errors import CalibfuseError, CheckpointError, InputError, ScorerError
from calibfuse.hub import resolve_checkpoint
from calibfuse.scorers import LinearScorer, ToxicityScorer, check_scores, load_scorer
from calibfuse.scorers.adapters import FunctionScorer, TransformersScorer, find_toxic_label
from calibfuse.scorers.linear import FeatureConfig

TEXTS = ["a word", "", "another one with more words than the first", "x " * 200]


@pytest.fixture
def linear_folder(tmp_path):
    weights = np.random.default_rng(0).normal(size=1 << 10)
    LinearScorer(weights, FeatureConfig(bucket_bits=10), name="mine").save(tmp_path / "linear")
    return tmp_path / "linear"


# ---- names


@pytest.mark.parametrize("spec", [None, "bundled"])
def test_the_bundled_scorer_is_the_default(spec):
    scorer = load_scorer(spec)
    assert isinstance(scorer, LinearScorer)
    assert isinstance(scorer, ToxicityScorer)
    assert scorer.name == "bundled"


def test_a_folder_of_ours_is_loaded(linear_folder):
    assert load_scorer(str(linear_folder)).name == load_scorer(linear_folder).name == "mine"


def test_a_function_is_a_scorer():
    scorer = load_scorer(lambda texts: [len(text) / 1000 for text in texts])
    assert scorer.score(["abc", ""]).tolist() == [0.003, 0.0]
    assert scorer.score([]).shape == (0,)


def test_a_function_is_found_by_name_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "judge_of_test.py").write_text(
        "class Judge:\n    name = 'strict'\n    def score(self, texts):\n        return [1.0] * len(texts)\n"
        "def lenient(texts):\n    return [0.0] * len(texts)\njudge = Judge()\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "judge_of_test", raising=False)
    before = list(sys.path)
    assert load_scorer("judge_of_test:lenient").score(["a"]).tolist() == [0.0]
    strict = load_scorer("judge_of_test:judge")
    assert (strict.name, strict.score(["a"]).tolist()) == ("strict", [1.0])
    assert sys.path == before
    with pytest.raises(InputError, match="no 'nothing'"):
        load_scorer("judge_of_test:nothing")
    with pytest.raises(ScorerError, match="got int"):
        load_scorer("judge_of_test:number")
    with pytest.raises(InputError, match="cannot be imported"):
        load_scorer("no_such_module_here:function")


def test_a_scorer_object_is_checked_too():
    class Broken:
        name = "broken"

        def score(self, texts):
            return [2.0 for _ in texts]

    with pytest.raises(ScorerError, match="'broken' returned 2.0 for text 0"):
        load_scorer(Broken()).score(["a"])


@pytest.mark.parametrize("spec", ["no/such-model-anywhere", "./nowhere", ""], ids=["hub id", "path", "empty"])
def test_names_without_a_scorer_are_refused(spec):
    with pytest.raises(CheckpointError):
        load_scorer(spec, local_files_only=True)


def test_a_calibrator_is_no_scorer():
    with pytest.raises(CheckpointError, match="Expected a toxicity scorer, but .* 'calibfuse-calibrator'"):
        load_scorer(resolve_checkpoint(None))


def test_a_number_is_no_scorer():
    with pytest.raises(ScorerError, match="got int"):
        load_scorer(3)


# ---- what a scorer may return


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], r"shape \(1,\)"),
        ([[0.1, 0.2]], "shape"),
        ([0.1, float("nan")], "nan for text 1"),
        ([float("inf"), 0.1], "inf for text 0"),
        ([0.1, -0.01], "text 1"),
        ([0.1, None], "nan for text 1"),
        (["a", "b"], "no list of numbers"),
        (None, "shape"),
    ],
    ids=str,
)
def test_what_is_no_score_is_an_error_never_a_number(values, message):
    with pytest.raises(ScorerError, match=message):
        FunctionScorer(lambda texts: values, "test").score(["a", "b"])
    with pytest.raises(ScorerError):
        check_scores(values, 2, "test")


def test_arrays_and_tensors_are_scores():
    for values in (np.array([0, 1]), torch.tensor([0.0, 1.0]), (0, 1)):
        scores = check_scores(values, 2, "test")
        assert (scores.dtype, scores.tolist()) == (np.float64, [0.0, 1.0])


def test_a_failing_function_is_chained():
    def fail(texts):
        raise KeyError("boom")

    with pytest.raises(ScorerError, match="KeyError") as raised:
        FunctionScorer(fail, "test").score(["a"])
    assert isinstance(raised.value.__cause__, KeyError)
    assert isinstance(raised.value, CalibfuseError)


# ---- transformers


@pytest.fixture(scope="module")
def fast_tokenizer():
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    vocabulary |= {word: i for i, word in enumerate("a word another one with more words than the first x".split(), 4)}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def classifier(labels=("neutral", "toxic"), problem_type=None, positions=64):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=positions,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem_type,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture
def classifier_folder(tmp_path, fast_tokenizer):
    classifier().save_pretrained(tmp_path / "classifier")
    fast_tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_classifier_folder_is_loaded_and_scores_like_the_model(classifier_folder, fast_tokenizer):
    scorer = load_scorer(str(classifier_folder), batch_size=2)
    assert isinstance(scorer, TransformersScorer)
    scores = scorer.score(TEXTS)
    model = classifier()
    for text, score in zip(TEXTS[:3], scores, strict=False):
        with torch.no_grad():
            logits = model(
                **{k: v for k, v in fast_tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}
            ).logits
        assert score == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batches_do_not_change_a_classifier(fast_tokenizer, batch_size):
    scorer = TransformersScorer(classifier(), fast_tokenizer, name="test", batch_size=batch_size)
    alone = [scorer.score([text])[0] for text in TEXTS]
    np.testing.assert_allclose(scorer.score(TEXTS), alone, atol=1e-5)


def test_a_long_text_scores_as_its_worst_piece(fast_tokenizer):
    """200 tokens, 64 positions: pieces of 62 tokens, 30 apart."""
    scorer = TransformersScorer(classifier(), fast_tokenizer, name="test")
    words = ("a word another one with " * 40).split()
    pieces = [" ".join(words[i : i + 62]) for i in range(0, 140, 30)]
    assert scorer.score([" ".join(words)])[0] == pytest.approx(scorer.score(pieces).max(), abs=1e-5)


def test_several_labels_use_the_sigmoid(fast_tokenizer):
    model = classifier(("toxicity", "insult", "threat"), "multi_label_classification")
    scorer = TransformersScorer(model, fast_tokenizer, name="test")
    with torch.no_grad():
        logits = model(torch.tensor([[1, 4, 2]])).logits
    assert scorer.score(["a"])[0] == pytest.approx(logits.sigmoid()[0, 0].item(), abs=1e-5)


def test_a_model_without_padding_is_run_one_by_one(fast_tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=64, id2label={0: "ok", 1: "toxic"})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast_tokenizer.backend_tokenizer)
    scorer = TransformersScorer(GPT2ForSequenceClassification(config), tokenizer, name="test")
    assert scorer.score(["a word", "one"]).shape == (2,)


def test_a_fast_classifier_stays_within_a_hundredth(fast_tokenizer):
    texts = [
        " ".join(np.random.default_rng(i).choice(["a", "word", "another", "one", "more", "x"], 20)) for i in range(50)
    ]
    exact = TransformersScorer(classifier(), fast_tokenizer, name="test").score(texts)
    fast = TransformersScorer(classifier(), fast_tokenizer, name="test", fast=True).score(texts)
    assert exact.std() > 0.05
    np.testing.assert_allclose(fast, exact, atol=0.01)


def test_nan_from_a_model_is_an_error(fast_tokenizer):
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(ScorerError, match="nan for text 0"):
        TransformersScorer(model, fast_tokenizer, name="test").score(["a", "b"])


@pytest.mark.parametrize(
    ("labels", "label", "index"),
    [
        (["neutral", "toxic"], None, 1),
        (["Toxic", "other"], None, 0),
        (["nothate", "hate"], None, 1),
        (["LABEL_0", "LABEL_1"], None, 1),
        (["non-offensive", "offensive"], None, 1),
        (["score"], None, 0),
        (["a", "Severe_Toxic"], "severe-toxic", 1),
    ],
    ids=str,
)
def test_the_toxic_class_is_found(labels, label, index):
    assert find_toxic_label(dict(enumerate(labels)), label, "test") == index


@pytest.mark.parametrize(
    ("labels", "label"),
    [(["happy", "sad"], None), (["LABEL_0", "LABEL_1", "LABEL_2"], None), (["neutral", "toxic"], "angry")],
    ids=str,
)
def test_no_toxic_class_is_an_error(labels, label):
    with pytest.raises(InputError, match="its classes are"):
        find_toxic_label(dict(enumerate(labels)), label, "test")


def test_a_language_model_is_no_classifier(tmp_path, fast_tokenizer):
    """A checkpoint without a trained classification head would score at random."""
    from transformers import BertModel

    config = classifier().config
    BertModel(config).save_pretrained(tmp_path)
    fast_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no trained text classifier"):
        load_scorer(str(tmp_path))


def test_weights_that_are_no_safetensors_are_refused(classifier_folder):
    (classifier_folder / "model.safetensors").rename(classifier_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_scorer(str(classifier_folder))
