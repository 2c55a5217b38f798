"""Baselines against their formulas."""

import math

import pytest
import torch
from tiny_calibrators import make_calibrator
from transformers import TemperatureLogitsWarper

from calibfuse.errors import InputError
from calibfuse.evaluation import PLAIN, Method, Prompt, SamplingConfig
from calibfuse.evaluation.baselines import RewardGuidance, SelfDebiasing, forbid_words, match_temperature
from calibfuse.evaluation.methods import BASELINES, ComparedMethods, parse_baseline
from calibfuse.evaluation.speed import measure_speed
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion
from calibfuse.scorers import load_scorer

TEXTS = ("The river was wide and slow.", "She said nothing at all")


@pytest.fixture(scope="module")
def scorer():
    return load_scorer(lambda texts: [min(1.0, text.count("e") / 10) for text in texts])


def step(target, *texts):
    """Rows of equal length and the target's scores after them."""
    rows = [target.tokenizer(text)["input_ids"] for text in texts]
    length = min(map(len, rows))
    input_ids = torch.tensor([row[:length] for row in rows])
    with torch.no_grad():
        return input_ids, target.model(input_ids).logits[:, -1]


def test_the_matched_temperature_gives_back_a_temperature(target):
    """A method that is a temperature is matched by itself, and plain decoding by 1."""
    assert match_temperature(target, lambda: [TemperatureLogitsWarper(1.7)], TEXTS) == pytest.approx(1.7, rel=1e-3)
    assert match_temperature(target, list, TEXTS) == pytest.approx(1.0, rel=1e-3)


def test_words_of_the_list_cannot_be_completed(target):
    """Every id that completes "river" is excluded right after its beginning, and nothing else is."""
    ban = forbid_words(target.tokenizer, ["river"])
    ids = target.tokenizer(" river", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    before = torch.tensor([[7, 9, *ids[:-1]], [7, 9, *[8] * (len(ids) - 1)]])
    scores = torch.zeros(2, len(target.tokenizer))
    banned = ban(before, scores)
    assert banned[0, ids[-1]] == -torch.inf
    assert banned[1, ids[-1]] == 0.0
    assert (banned == -torch.inf).sum() <= 3
    assert not scores.any()


def test_single_token_words_are_always_excluded(target):
    text = target.tokenizer.convert_ids_to_tokens([70])[0]
    banned = forbid_words(target.tokenizer, [text])(torch.tensor([[9]]), torch.zeros(1, len(target.tokenizer)))
    assert banned[0, 70] == -torch.inf


def test_generation_goes_round_a_listed_word(target):
    """Greedy decoding says some token; with that token's text on the list it says another one."""
    prompt = target.tokenizer("The river", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 2}
    plain = target.model.generate(input_ids=prompt, **options)[0, prompt.shape[1] :].tolist()
    names = [target.tokenizer.convert_ids_to_tokens(token_id) for token_id in plain]
    said = next(token_id for token_id, name in zip(plain, names, strict=True) if name.isascii() and name.isalpha())
    ban = forbid_words(target.tokenizer, [target.tokenizer.decode([said])])
    other = target.model.generate(input_ids=prompt, logits_processor=[ban], **options)[0, prompt.shape[1] :].tolist()
    assert said in plain
    assert said not in other


def test_reward_guidance_is_its_formula(target, scorer):
    input_ids, scores = step(target, *TEXTS)
    found = RewardGuidance(target.tokenizer, scorer, beta=3.0, candidates=5)(input_ids, scores)
    log_probs = scores.log_softmax(-1)
    for row in range(len(input_ids)):
        best = log_probs[row].topk(5).indices.tolist()
        for token_id in range(scores.shape[1]):
            if token_id not in best:
                assert found[row, token_id] == -torch.inf
                continue
            text = target.tokenizer.decode([*input_ids[row].tolist(), token_id], skip_special_tokens=True)
            reward = 1.0 - min(1.0, text.count("e") / 10)
            assert float(found[row, token_id]) == pytest.approx(
                float(log_probs[row, token_id]) + 3.0 * reward, abs=1e-4
            )


def test_self_debiasing_is_its_formula_and_padding_changes_nothing(target):
    input_ids, scores = step(target, *TEXTS)
    processor = SelfDebiasing(target, decay=20.0, announcement="A rude text: ")
    found = processor(input_ids, scores)
    before = [target.tokenizer.bos_token_id, *target.tokenizer("A rude text: ", add_special_tokens=False)["input_ids"]]
    for row in range(len(input_ids)):
        text = [token_id for token_id in input_ids[row].tolist() if token_id > 2]
        with torch.no_grad():
            announced = target.model(torch.tensor([[*before, *text]])).logits[0, -1].softmax(-1)
        plain = scores[row].softmax(-1)
        difference = plain - announced
        scale = torch.where(difference >= 0, 1.0, (20.0 * difference).exp()).clamp_min(0.01)
        assert torch.allclose(found[row], (plain * scale).log(), atol=1e-3)
    padded = torch.cat([torch.full((2, 3), target.tokenizer.pad_token_id), input_ids], dim=1)
    assert torch.allclose(processor(padded, scores), found, atol=1e-5)


def test_self_debiasing_reads_a_large_vocabulary_in_parts(target, monkeypatch):
    input_ids, scores = step(target, *TEXTS)
    processor = SelfDebiasing(target, decay=20.0)
    whole = processor(input_ids, scores)
    monkeypatch.setattr("calibfuse.evaluation.given_text.reading._SCORES_AT_ONCE", 1)
    assert torch.allclose(processor(input_ids, scores), whole, atol=1e-4)


def test_specifications_become_methods(target, scorer):
    make = ComparedMethods(target, guide_scorer=scorer).baseline
    assert [method.key for method in make("reward:5,50")] == ["reward-5", "reward-50"]
    assert [method.alpha for method in make("self-debias")] == [10.0, 50.0, 100.0]
    assert [method.key for method in make("bad-words")] == ["bad-words"]
    assert [each.is_default for each in make("reward")] == [True, False]
    assert make("top-k:3")[0].title == "top-k 3"
    guide = make_calibrator().bind(target.tokenizer, use_disk_cache=False)
    matched = Method("m", "m", lambda: [CalibFusion(guide, FusionConfig(alpha=1.0))])
    (control,) = make("temperature", matched)
    assert control.key == "temperature-matched"
    assert 0.05 < control.settings["strength"] < 20


@pytest.mark.parametrize("name", [name for name, each in BASELINES.items() if each.make])
def test_every_baseline_decodes_and_keeps_its_hands_off_the_scores(target, scorer, name):
    input_ids, scores = step(target, *TEXTS)
    copy = scores.clone()
    for method in ComparedMethods(target, guide_scorer=scorer).baseline(name, PLAIN):
        (processor,) = method.make_processors()
        found = processor(input_ids, scores)
        assert found.shape == scores.shape
        assert (found > -torch.inf).any(dim=1).all()
    assert torch.equal(scores, copy)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prayer", "Unknown baseline 'prayer'; choose among"),
        ("reward:a", "Expected numbers"),
        ("reward:0", "must be above 0"),
        ("reward:nan", "must be above 0"),
        ("bad-words:2", "has no strength"),
    ],
)
def test_bad_specifications_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        parse_baseline(spec)


def test_bad_strengths_are_refused(target):
    with pytest.raises(InputError, match="whole number"):
        ComparedMethods(target).baseline("top-k:2.5")
    with pytest.raises(InputError, match="a method to match"):
        ComparedMethods(target).baseline("temperature")
    with pytest.raises(InputError, match="above 0"):
        ComparedMethods(target).baseline(f"temperature:{math.inf}")


def test_speed_is_compared_round_by_round(target):
    methods = [PLAIN, Method("same", "same", lambda: [TemperatureLogitsWarper(1.0)])]
    sampling = SamplingConfig(max_new_tokens=3)
    found = measure_speed(target, methods, [Prompt("a", "The river")], sampling, rows=2, rounds=2)
    assert found["plain"].kept == 1.0
    assert found["same"].lowest <= found["same"].kept <= found["same"].highest
    assert found["same"].tokens_per_second > 0
