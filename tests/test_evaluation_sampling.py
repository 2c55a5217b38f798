"""Sampling: an exact draw whose randomness belongs to the row, so that batches and kills leave no trace in the text."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.logits_process import TopPLogitsWarper

from calibfuse.errors import DataError, InputError
from calibfuse.evaluation import LanguageModel, Prompt, SamplingConfig, sample_continuations
from calibfuse.evaluation.sampling import Journal, PromptRecord
from calibfuse.generation.decoding import Continuation, Decoding, encode
from calibfuse.generation.seeded_sampling import SeededSampling, gumbel_noise, nucleus, row_key

TEXTS = ["The river", "A long walk through the town and then", "She said", "Every morning he", "It"]
PROMPTS = [Prompt(f"line {number}", text) for number, text in enumerate(TEXTS)]
CONFIG = SamplingConfig(samples=3, max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tokenizer, tiny_llama):
    return tiny_llama(len(tokenizer))


class Ban(LogitsProcessor):
    """Excludes every id above a limit."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.limit :] = -torch.inf
        return scores


def draw(model, tokenizer, path, *, prompts=PROMPTS, config=CONFIG, make=list, batch_size=8, resume=False):
    """The records of all prompts."""
    journal = Journal(path, {"settings": config.to_dict()}, resume=resume)
    target = LanguageModel("tiny", model, tokenizer)
    sample_continuations(target, prompts, make, config, journal, batch_size=batch_size)
    return list(journal.records([prompt.id for prompt in prompts]))


def said(records):
    return [[each.token_ids for each in record.continuations] for record in records]


# ---- the draw


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_one_of_transformers(top_p):
    log_probs = (torch.randn(7, 300, generator=torch.manual_seed(1)) * 3).log_softmax(-1)
    kept = TopPLogitsWarper(top_p)(None, log_probs) > -torch.inf
    assert torch.equal(nucleus(log_probs, top_p=top_p), kept)


def test_the_nucleus_keeps_the_best_token_excluded_ones_stay_out_and_top_k_counts():
    log_probs = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.2, 0.7, 0.0]]).log()
    assert nucleus(log_probs, top_p=0.1).tolist() == [[True, False, False, False], [False, False, True, False]]
    assert nucleus(log_probs).tolist() == [[True, True, True, False]] * 2
    assert nucleus(log_probs, top_k=2).sum(dim=1).tolist() == [2, 2]
    assert nucleus(log_probs, top_k=99, top_p=0.89).sum(dim=1).tolist() == [2, 2]


def test_noise_is_standard_gumbel_and_depends_on_row_step_and_token():
    """Mean is Euler's constant 0.5772, variance pi^2/6; 200,000 draws put 5 standard errors at 0.015 and 0.04."""
    keys = torch.tensor([row_key(0, "a", "b", sample) for sample in range(200)]).repeat_interleave(1000)
    ids = torch.arange(1000).repeat(200)
    noise = gumbel_noise(keys, 3, ids)
    assert abs(float(noise.mean()) - 0.5772) < 0.015
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.04
    assert len(noise.unique()) == len(noise)
    other = gumbel_noise(keys, 4, ids)
    assert abs(float(np.corrcoef(noise.numpy(), other.numpy())[0, 1])) < 0.012
    assert torch.equal(noise, gumbel_noise(keys, 3, ids))


def test_tokens_are_drawn_with_their_probabilities():
    """Chi-square with 4 degrees of freedom: a right draw exceeds 23.5 once in 10,000 seeds; the seed is fixed."""
    probabilities = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    count = 20_000
    sampler = SeededSampling([row_key(5, "p", "text", row) for row in range(count)], 2, Decoding(top_p=1.0))
    chosen = sampler(torch.zeros(count, 2, dtype=torch.long), probabilities.log().expand(count, 5)).argmax(dim=-1)
    seen = torch.bincount(chosen, minlength=5).double()
    expected = probabilities.double() * count
    assert float(((seen - expected) ** 2 / expected).sum()) < 23.5


def test_temperature_and_truncation_shape_the_draw():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(4000, 4)
    keys = [row_key(0, "p", "t", row) for row in range(4000)]
    ids = torch.zeros(4000, 1, dtype=torch.long)
    hot = SeededSampling(keys, 1, Decoding(top_p=1.0, temperature=100.0))(ids, scores).argmax(dim=-1)
    cold = SeededSampling(keys, 1, Decoding(top_p=1.0, temperature=0.01))(ids, scores).argmax(dim=-1)
    cut = SeededSampling(keys, 1, Decoding(top_p=0.7))(ids, scores).argmax(dim=-1)
    assert cold.eq(0).all()
    assert torch.bincount(hot).min() > 800
    assert cut.max() == 1
    assert scores[0].tolist() == [2.0, 1.0, 0.0, -1.0]


@pytest.mark.parametrize("settings", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": 0.0}])
def test_impossible_sampling_is_refused(settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} must be"):
        SamplingConfig(**settings)


def test_a_draw_set_up_for_other_rows_is_refused():
    with pytest.raises(InputError, match="set up for 1 rows, but got scores of 2"):
        SeededSampling([1], 1, Decoding())(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 4))


# ---- continuations


def test_the_batch_size_changes_nothing(model, tokenizer, tmp_path):
    alone = said(draw(model, tokenizer, tmp_path / "a", batch_size=1))
    assert said(draw(model, tokenizer, tmp_path / "b", batch_size=4)) == alone
    assert said(draw(model, tokenizer, tmp_path / "c", batch_size=64)) == alone
    assert len({row for rows in alone for row in rows}) > 10


def test_other_prompts_and_more_samples_change_nothing(model, tokenizer, tmp_path):
    everything = said(draw(model, tokenizer, tmp_path / "a"))
    assert said(draw(model, tokenizer, tmp_path / "b", prompts=PROMPTS[3:4])) == everything[3:4]
    more = SamplingConfig(samples=5, max_new_tokens=6)
    assert [rows[:3] for rows in said(draw(model, tokenizer, tmp_path / "c", config=more))] == everything


def test_seeds_differ(model, tokenizer, tmp_path):
    other = SamplingConfig(samples=3, max_new_tokens=6, seed=1)
    assert said(draw(model, tokenizer, tmp_path / "a")) != said(draw(model, tokenizer, tmp_path / "b", config=other))


def test_continuations_follow_the_models_distribution(model, tokenizer, tmp_path):
    """First tokens of 3,000 continuations against the model's own top-p distribution, total variation.

    For the 60 likeliest tokens the expected variation of a right sampler is about 0.5 sqrt(60 / 3000) = 0.07; 0.12 is
    never seen by chance.
    """
    config = SamplingConfig(samples=3000, max_new_tokens=1, top_p=0.8)
    (record,) = draw(model, tokenizer, tmp_path / "a", prompts=PROMPTS[:1], config=config, batch_size=3000)
    with torch.no_grad():
        log_probs = model(torch.tensor([encode(tokenizer, TEXTS[0])])).logits[:, -1].log_softmax(-1)
    wanted = log_probs.masked_fill(~nucleus(log_probs, top_p=0.8), -torch.inf).softmax(-1)[0]
    ids = [each.token_ids[0] if each.token_ids else 1 for each in record.continuations]  # 1 ends a text
    seen = torch.bincount(torch.tensor(ids), minlength=len(wanted)) / 3000
    assert (wanted > 0).sum() > 5
    assert float((seen - wanted).abs().sum()) / 2 < 0.12


def test_processors_come_before_the_draw_and_are_made_per_batch(model, tokenizer, tmp_path):
    made = []

    def make():
        made.append(1)
        return [Ban(100)]

    records = draw(model, tokenizer, tmp_path / "a", make=make, batch_size=6)
    assert len(made) == 3
    assert max(token for rows in said(records) for row in rows for token in row) < 100


def test_text_begins_with_the_space_that_the_tokens_say(model, tokenizer, tmp_path):
    for record in draw(model, tokenizer, tmp_path / "a"):
        for each in record.continuations:
            whole = tokenizer.decode([*encode(tokenizer, record.prompt), *each.token_ids], skip_special_tokens=True)
            assert whole == record.prompt + each.text


def test_the_end_mark_ends_a_text_and_is_left_out(model, tokenizer, tmp_path):
    class End(LogitsProcessor):
        def __call__(self, input_ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, 1] = 0.0
            return forced

    for record in draw(model, tokenizer, tmp_path / "a", make=lambda: [End()]):
        assert all(each == Continuation("", (), True) for each in record.continuations)


def test_every_tokenizer_family_and_position_kind_works(any_tokenizer, wrap_tokenizer, tiny_gpt2, tmp_path):
    tokenizer = wrap_tokenizer(any_tokenizer)
    model = tiny_gpt2(len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    together = draw(model, tokenizer, tmp_path / "a", batch_size=32)
    assert said(together) == said(draw(model, tokenizer, tmp_path / "b", batch_size=1))


def test_without_a_token_to_pad_with_only_equal_lengths_go_together(byte_level_tokenizer, tiny_llama, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer, padding_side="left")
    model = tiny_llama(len(tokenizer), eos_token_id=None, pad_token_id=None, bos_token_id=None)
    model.generation_config.eos_token_id = None
    together = draw(model, tokenizer, tmp_path / "a", batch_size=32)
    assert said(together) == said(draw(model, tokenizer, tmp_path / "b", batch_size=1))


def test_prompts_that_leave_no_room_are_refused(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="256 positions"):
        draw(model, tokenizer, tmp_path / "a", prompts=[Prompt("long", "river " * 300)])


# ---- the journal


def test_a_killed_run_goes_on_where_it_was(model, tokenizer, tmp_path):
    whole = draw(model, tokenizer, tmp_path / "whole")
    path = tmp_path / "killed"
    draw(model, tokenizer, path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    journal = Journal(path, {"settings": CONFIG.to_dict()}, resume=True)
    assert len(journal) == 2
    made = []
    resumed = draw(model, tokenizer, path, make=lambda: made.append(1) or [], batch_size=3, resume=True)
    assert said(resumed) == said(whole)
    assert len(made) == 3
    assert sorted(json.loads(line)["prompt"] for line in path.read_text().splitlines()[1:]) == sorted(TEXTS)


def test_a_finished_run_is_not_repeated_and_without_resume_it_is(model, tokenizer, tmp_path):
    path = tmp_path / "a"
    draw(model, tokenizer, path)
    before = path.read_bytes()
    draw(model, tokenizer, path, make=lambda: pytest.fail("nothing is missing"), resume=True)
    assert path.read_bytes() == before
    draw(model, tokenizer, path, prompts=PROMPTS[:1])
    assert len(path.read_bytes().splitlines()) == 2


def test_other_settings_other_files_and_damage_are_refused(model, tokenizer, tmp_path):
    path = tmp_path / "a"
    draw(model, tokenizer, path)
    with pytest.raises(InputError, match=r"other settings \(settings\)"):
        draw(model, tokenizer, path, config=SamplingConfig(samples=3, max_new_tokens=7), resume=True)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{}\n" + b"".join(lines[1:]))
    with pytest.raises(DataError, match="Line 2"):
        draw(model, tokenizer, path, resume=True)
    path.write_text("something else\n")
    with pytest.raises(InputError, match="holds no continuations"):
        draw(model, tokenizer, path, resume=True)


def test_records_survive_their_line():
    record = PromptRecord("x", "a\nb", (Continuation(" c\u2028d", (1, 2), False), Continuation("", (), True)))
    assert PromptRecord.from_line(record.to_line()) == record
    assert record.to_line().count("\n") == 1
