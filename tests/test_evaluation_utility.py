"""What guidance costs at tasks: figures against a slow loop, and files that are read."""

import json
import math

import pytest
import torch
from transformers import LogitsProcessor

from calibfuse.errors import DataError
from calibfuse.evaluation import GuidedReader, LanguageModel, Utility, load_utility, measure_utility
from calibfuse.evaluation.given_text.reading import split_ids

TASKS = Utility(
    passages=("She went to the old river", "He said nothing at all", "It rained on the town"),
    articles=("The river was wide and slow.\nIt rained all day.", "A long walk through the town"),
)


class Scale(LogitsProcessor):
    """Another temperature: changes every probability and no first choice."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, input_ids, scores):
        return scores * self.factor


@pytest.fixture(scope="module")
def target(byte_level_tokenizer, wrap_tokenizer, tiny_llama):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    return LanguageModel("tiny", tiny_llama(len(tokenizer)), tokenizer)


def by_name(result):
    return {each.name: each for each in result.figures}


def slow_nats(target, before, after, factor):
    """Step by step: nats of the ids after, and whether each is the first choice."""
    nats, is_best = 0.0, True
    for place in range(len(after)):
        with torch.no_grad():
            scores = factor * target.model(torch.tensor([[*before, *after[:place]]])).logits[0, -1]
        nats -= float(scores.log_softmax(-1)[after[place]])
        is_best &= int(scores.argmax()) == after[place]
    return nats, is_best


def test_lambada_and_word_perplexity_are_what_a_slow_loop_finds(target):
    found = by_name(measure_utility(GuidedReader(target, lambda: [Scale(3.0)], batch_size=2), TASKS, resamples=20))
    last = [split_ids(target.tokenizer, *text.rsplit(" ", 1)) for text in TASKS.passages]
    last = [
        split_ids(target.tokenizer, text.rpartition(" ")[0], " " + text.rpartition(" ")[2]) for text in TASKS.passages
    ]
    for side, factor in (("plain", 1.0), ("guided", 3.0)):
        nats, hits = zip(*(slow_nats(target, *pair, factor) for pair in last), strict=True)
        assert getattr(found["lambada_perplexity"], side).value == pytest.approx(math.exp(sum(nats) / 3), rel=1e-4)
        assert getattr(found["lambada_accuracy"], side).value == pytest.approx(sum(hits) / 3)
        nats = [slow_nats(target, *split_ids(target.tokenizer, "", text), factor)[0] for text in TASKS.articles]
        words = sum(len(text.split()) for text in TASKS.articles)
        assert getattr(found["word_perplexity"], side).value == pytest.approx(math.exp(sum(nats) / words), rel=1e-3)
    figure = found["word_perplexity"]
    assert figure.texts == 2
    assert figure.change.value == pytest.approx(figure.guided.value / figure.plain.value - 1.0)


def test_long_text_is_read_in_windows(target, monkeypatch):
    whole = by_name(measure_utility(GuidedReader(target, list), Utility(articles=TASKS.articles), resamples=5))
    monkeypatch.setattr("calibfuse.evaluation.given_text.utility._WINDOW", 4)
    windows = by_name(measure_utility(GuidedReader(target, list), Utility(articles=TASKS.articles), resamples=5))
    assert whole["word_perplexity"].plain.value != pytest.approx(windows["word_perplexity"].plain.value)
    assert windows["word_perplexity"].plain.value == pytest.approx(windows["word_perplexity"].guided.value)


def test_files_are_read_in_their_own_formats(tmp_path):
    (tmp_path / "lambada.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "one", "d e"))
    )
    (tmp_path / "wiki.txt").write_text(
        " = One = \n \n First text . \n = = Part = = \n More . \n = Two = \n Second . \n"
    )
    found = load_utility(lambada=tmp_path / "lambada.jsonl", wikitext=tmp_path / "wiki.txt")
    assert found.passages == ("a b c", "d e")
    assert found.articles == ("= One =\nFirst text .\n= = Part = =\nMore .", "= Two =\nSecond .")
    assert len(load_utility(wikitext=tmp_path / "wiki.txt", count=1).articles) == 1
    (tmp_path / "none.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="passages of several words"):
        load_utility(lambada=tmp_path / "none.jsonl")


def test_the_real_files_are_read(shared_data):
    found = load_utility(
        lambada=shared_data / "text/lambada-test.jsonl", wikitext=shared_data / "text/wikitext2-test.txt", count=20
    )
    assert len(found.passages) == len(found.articles) == 20
    assert all(text.startswith("= ") for text in found.articles)
