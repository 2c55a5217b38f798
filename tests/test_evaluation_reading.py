"""Likelihoods against a slow loop, and continuations cut out of a judge's own tokenization."""

import numpy as np
import pytest
import torch

from calibfuse.errors import InputError
from calibfuse.evaluation import LanguageModel
from calibfuse.evaluation.given_text.reading import score_ids, score_texts, split_ids


@pytest.fixture(scope="module")
def model(tokenizer, tiny_gpt2):
    return tiny_gpt2(len(tokenizer))


PROMPTS = ["The river", "A long walk through the town", "She said", "It"]
CONTINUATIONS = [" was wide and slow.", "", " nothing at all", " rained"]


def slow_nats(model, prompt, continuation):
    """One token at a time."""
    ids = [*prompt, *continuation]
    total = 0.0
    with torch.no_grad():
        for place in range(len(prompt), len(ids)):
            log_probs = model(torch.tensor([ids[:place]])).logits[0, -1].log_softmax(-1)
            total -= float(log_probs[ids[place]])
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_nats_equal_those_of_a_slow_loop_in_any_batch(model, tokenizer, batch_size):
    pairs = [split_ids(tokenizer, *pair) for pair in zip(PROMPTS, CONTINUATIONS, strict=True)]
    found = score_ids(
        LanguageModel("model", model, None),
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        batch_size=batch_size,
    )
    np.testing.assert_allclose(found.nats, [slow_nats(model, *pair) for pair in pairs], rtol=1e-4)
    assert found.tokens.tolist() == [len(pair[1]) for pair in pairs]


def test_large_batches_are_cut_to_what_fits(model, tokenizer, monkeypatch):
    pairs = [split_ids(tokenizer, *pair) for pair in zip(PROMPTS, CONTINUATIONS, strict=True)]
    whole = score_ids(LanguageModel("model", model, None), [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    monkeypatch.setattr("calibfuse.evaluation.given_text.reading._SCORES_AT_ONCE", 1)
    cut = score_ids(LanguageModel("model", model, None), [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    np.testing.assert_allclose(cut.nats, whole.nats, rtol=1e-4)


def test_text_is_scored_as_its_ids(model, tokenizer):
    pairs = [split_ids(tokenizer, *pair) for pair in zip(PROMPTS, CONTINUATIONS, strict=True)]
    by_ids = score_ids(LanguageModel("model", model, None), [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    by_text = score_texts(LanguageModel("judge", model, tokenizer), PROMPTS, CONTINUATIONS)
    np.testing.assert_allclose(by_text.nats, by_ids.nats)
    assert by_text.nats[1] == by_text.tokens[1] == 0.0


@pytest.mark.parametrize("split", range(1, 40, 3))
def test_every_tokenizer_cuts_where_the_continuation_begins(any_tokenizer, wrap_tokenizer, split):
    """The two parts are the whole text's ids, and the second begins with the first token that ends inside."""
    tokenizer = wrap_tokenizer(any_tokenizer)
    text = "The old river was wide and slow, said the woman."
    before, after = split_ids(tokenizer, text[:split], text[split:])
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert before[0] == tokenizer.bos_token_id
    assert [*before[1:], *after] == whole["input_ids"]
    ends = [end for _, end in whole["offset_mapping"]]
    assert all(end > split for end in ends[len(before) - 1 :])
    assert all(end <= split for end in ends[: len(before) - 1])


def test_a_slow_tokenizer_is_cut_at_the_first_difference(tokenizer, monkeypatch):
    fast = split_ids(tokenizer, "The river", " was wide")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert split_ids(tokenizer, "The river", " was wide") == fast


def test_texts_longer_than_the_model_are_refused(model):
    with pytest.raises(InputError, match="300 tokens, but the model has 256"):
        score_ids(LanguageModel("model", model, None), [[5] * 290], [[6] * 10])
