"""Samples: drawn from the base itself, weights that undo a temperature, labels, files."""

import math

import pytest
import torch
from small_world import LENGTH, PROMPT, SIZE, make_world, softened

from calibfuse.errors import CheckpointError, DataError, InputError, ScorerError
from calibfuse.value.oracle import FunctionOracle
from calibfuse.value.samples import SampleSet, SamplingPlan, draw_samples, label_samples

PROMPTS = ["The weather is", "A dog", "Once upon a time there was a"]


@pytest.fixture(scope="module")
def model(tiny_llama, tokenizer):
    return softened(tiny_llama(len(tokenizer)), 0.1)


def draw(model, tokenizer, prompts=PROMPTS, **options):
    options = {"per_prompt": 3, "max_new_tokens": 6, "seed": 0, "batch_size": 4} | options
    seed = options.pop("seed")
    return draw_samples(model, tokenizer, prompts, SamplingPlan(**options), seed=seed, show_progress=False)


class WordTokenizer:
    """As much of a tokenizer as sampling the small world needs; it has no padding token."""

    pad_token_id = eos_token_id = sep_token_id = bos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": list(PROMPT)}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_rows_are_prompt_then_continuation_in_the_order_of_the_prompts(model, tokenizer):
    samples = draw(model, tokenizer)
    assert len(samples) == 9
    for row in range(9):
        prompt = tokenizer(PROMPTS[row // 3])["input_ids"]
        assert samples.input_ids[row, : len(prompt)].tolist() == prompt
        assert int(samples.prompt_lengths[row]) == len(prompt)
        assert 1 <= int(samples.lengths[row]) - len(prompt) <= 6
    assert (samples.log_weights == 0).all()
    assert samples.satisfaction.isnan().all()


def test_the_same_seed_draws_the_same(model, tokenizer):
    assert torch.equal(draw(model, tokenizer).input_ids, draw(model, tokenizer).input_ids)
    assert not torch.equal(draw(model, tokenizer).input_ids[:3], draw(model, tokenizer, seed=1).input_ids[:3])


def test_an_end_mark_ends_a_row_and_counts(model, tokenizer, tiny_llama):
    eager = softened(tiny_llama(len(tokenizer)), 0.1)
    plain = draw(eager, tokenizer, max_new_tokens=12)
    place = int(plain.prompt_lengths[0]) + 3
    eager.generation_config.eos_token_id = int(plain.input_ids[0, place])
    stopped = draw(eager, tokenizer, max_new_tokens=12)
    assert int(stopped.lengths[0]) == place + 1
    assert torch.equal(stopped.input_ids[0, : place + 1], plain.input_ids[0, : place + 1])


def test_draws_have_the_base_models_probabilities(tiny_llama):
    """4,000 draws of one token: each of 10 frequencies is within 5 standard errors (fails once in 10^5 seeds)."""
    base = softened(tiny_llama(SIZE, seed=3, eos_token_id=None))
    samples = draw(base, WordTokenizer(), ["w"], per_prompt=4000, max_new_tokens=1, batch_size=2000)
    with torch.no_grad():
        expected = base(input_ids=torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    found = torch.bincount(samples.input_ids[:, -1], minlength=SIZE) / 4000
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-6).all()


def test_weights_undo_the_temperature(tiny_llama):
    """The weighted mean of a label is its expectation under the base, whatever temperature drew (5 standard errors)."""
    world = make_world(softened(tiny_llama(SIZE, seed=3, eos_token_id=None)), soft=True)
    samples = draw(
        world.base, WordTokenizer(), ["w"], per_prompt=4000, max_new_tokens=LENGTH, batch_size=4000, temperature=1.5
    )
    words = samples.input_ids[:, len(PROMPT) :]
    labels = world.constraint[tuple(words.T)].float()
    with torch.no_grad():
        log_p = world.joint[tuple(words.T)].log()
        tempered = world.joint_of(lambda ids: (world.base(input_ids=ids).logits.double() / 1.5).log_softmax(-1))
    torch.testing.assert_close(samples.log_weights.double(), log_p - tempered[tuple(words.T)].log(), atol=1e-3, rtol=0)
    weights = samples.log_weights.exp()
    weighted = weights * labels
    assert abs(float(weighted.mean()) - world.expectation(world.joint)) < 5 * float(weighted.std()) / math.sqrt(4000)
    assert float(weights.std()) > 0.1  # there was something to undo


def test_a_padded_batch_draws_from_the_same_distributions(model, tokenizer):
    """Log-weights are made of the very logits that drew: they equal those of a forward pass without padding."""
    samples = draw(model, tokenizer, per_prompt=2, temperature=1.4, batch_size=6)
    for row in range(len(samples)):
        length, start = int(samples.lengths[row]), int(samples.prompt_lengths[row])
        ids = samples.input_ids[row, :length]
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, start - 1 : -1]
        ratio = logits.log_softmax(-1) - (logits / 1.4).log_softmax(-1)
        expected = ratio.gather(1, ids[start:, None]).sum()
        torch.testing.assert_close(samples.log_weights[row], expected, atol=1e-3, rtol=0)


def test_labels_are_of_prompt_and_continuation_or_the_latter_alone(model, tokenizer):
    seen = []

    def spy(texts):
        seen.extend(texts)
        return [0.5] * len(texts)

    samples = label_samples(draw(model, tokenizer), tokenizer, FunctionOracle(spy, "spy"), batch_size=2)
    assert (samples.satisfaction == 0.5).all()
    assert all(text.startswith(PROMPTS[number // 3]) for number, text in enumerate(seen))
    whole = list(seen)
    seen.clear()
    label_samples(samples, tokenizer, FunctionOracle(spy, "spy"), continuation_only=True)
    assert all(text.endswith(tail) for text, tail in zip(whole, seen, strict=True))


def test_what_cannot_be_labelled_is_nan_not_zero(model, tokenizer):
    oracle = FunctionOracle(lambda texts: [math.nan if number % 3 == 0 else 1.0 for number in range(len(texts))], "o")
    samples = label_samples(draw(model, tokenizer), tokenizer, oracle)
    assert int(samples.satisfaction.isnan().sum()) == 3
    assert int((samples.satisfaction == 1.0).sum()) == 6


def test_an_oracle_that_cannot_label_most_texts(model, tokenizer):
    oracle = FunctionOracle(lambda texts: [math.nan] * len(texts), "blind")
    with pytest.raises(ScorerError, match="The oracle 'blind' could not label 9 of 9 texts"):
        label_samples(draw(model, tokenizer), tokenizer, oracle)


def test_saving_and_loading_is_exact(model, tokenizer, tmp_path):
    samples = label_samples(draw(model, tokenizer), tokenizer, FunctionOracle(lambda t: [0.3] * len(t), "o"))
    samples.save(tmp_path / "set")
    again = SampleSet.load(tmp_path / "set")
    for name in ("input_ids", "lengths", "prompt_lengths", "log_weights", "satisfaction"):
        assert torch.equal(getattr(again, name), getattr(samples, name))
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["samples.safetensors"]


def test_samples_that_are_not_there_or_damaged(model, tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        SampleSet.load(tmp_path)
    draw(model, tokenizer).save(tmp_path)
    data = (tmp_path / "samples.safetensors").read_bytes()
    (tmp_path / "samples.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        SampleSet.load(tmp_path)


def test_sets_of_different_lengths_can_be_put_together(model, tokenizer):
    one, two = draw(model, tokenizer, PROMPTS[:1]), draw(model, tokenizer, PROMPTS[2:])
    both = SampleSet.concatenate([one, two])
    assert len(both) == 6
    for row, (part, place) in enumerate([*((one, i) for i in range(3)), *((two, i) for i in range(3))]):
        length = int(both.lengths[row])
        assert both.input_ids[row, :length].tolist() == part.input_ids[place, :length].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_prompt": 0}, "per_prompt must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"max_new_tokens": 300}, "has 256 positions; leave long prompts out"),
    ],
)
def test_bad_numbers(model, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        draw(model, tokenizer, **options)


def test_no_prompts(model, tokenizer):
    with pytest.raises(DataError, match="needs prompts, got none"):
        draw(model, tokenizer, [])


def test_a_prompt_without_tokens(model, tokenizer):
    with pytest.raises(InputError, match="finds no token in the prompt ''"):
        draw(model, tokenizer, ["The", ""])
