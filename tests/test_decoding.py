"""Real `generate()` with every decoding mode: cached decoding gives the tokens of recomputation from scratch.

Targets and calibrators are random with large weights, so that the choice of a token does not hang on rounding, and so
that the fusion changes what is said (each test asserts it: else agreement would prove nothing).
"""

import copy

import pytest
import torch
import transformers
from tiny_calibrators import EOS, PAD, Forgetful, counting_rebuilds, make_bound

from calibfuse.calibrator.body import KeyValueRing
from calibfuse.errors import FusionNotAppliedError
from calibfuse.fusion import FusionConfig
from calibfuse.processor import CalibFusion

VOCAB = 96
NEW = 26
CONFIG = FusionConfig(alpha=3.0, candidates=40, max_shift=20.0)
IS_V5 = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def bound():
    return make_bound(strength=3.0)


@pytest.fixture(autouse=True)
def small_slack(monkeypatch):
    """Old slots are dropped early, so that short generations see it."""
    monkeypatch.setattr(KeyValueRing, "slack", 12)


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return tiny_llama(VOCAB)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2):
    return tiny_gpt2(VOCAB)


@pytest.fixture(scope="module")
def t5():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, tie_word_embeddings=False,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.T5ForConditionalGeneration(config).eval()
        with torch.no_grad():
            model.lm_head.weight.normal_(std=0.6)
    return model


def prompts(rows=3, length=9, padded=False, seed=0):
    """Ids and attention mask; row i is left-padded by 2 i where `padded`."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for row in range(rows):
            ids[row, : 2 * row] = PAD
            mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, *processors, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": NEW, "pad_token_id": PAD} | options
    return model.generate(**inputs, **options, logits_processor=list(processors))


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "sampling with top-k and top-p": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3},
    "several sequences per prompt": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True, "temperature": 1.5},
    "repetition penalty and excluded tokens": {"repetition_penalty": 1.3, "bad_words_ids": [[7], [8], [9]]},
    "static cache": {"cache_implementation": "static"},
    "with minimum length": {"min_new_tokens": 20},
}


@pytest.mark.parametrize("fusion_mode", ["contrast", "geometric", "blend"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_modes_of_fusion_give_the_tokens_of_recomputation(request, bound, family, fusion_mode):
    model = request.getfixturevalue(family)
    config = CONFIG if fusion_mode == "contrast" else FusionConfig(mode=fusion_mode, alpha=0.6, candidates=40)
    fusion, inputs = CalibFusion(bound, config), prompts(padded=True)
    fused = generate(model, inputs, fusion)
    assert torch.equal(fused, generate(model, inputs, Forgetful(bound, config)))
    assert not torch.equal(fused, generate(model, inputs))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "left-padded"])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_decoding_modes_give_the_tokens_of_recomputation(llama, bound, options, padded):
    fusion, inputs = CalibFusion(bound, CONFIG), prompts(padded=padded)
    fused = generate(llama, inputs, fusion, **options)
    expected = generate(llama, inputs, Forgetful(bound, CONFIG), **options)
    assert torch.equal(fused, expected)
    plain = generate(llama, inputs, **options)
    assert fused.shape != plain.shape or not torch.equal(fused, plain)
    assert torch.equal(generate(llama, inputs, fusion, **options), expected)  # the same object once more


@pytest.mark.parametrize("seed", range(3))
def test_beams_are_reordered_and_still_agree(llama, bound, seed):
    fusion = CalibFusion(bound, CONFIG)
    inputs = prompts(rows=2, padded=True, seed=seed)
    options = {"num_beams": 5, "num_return_sequences": 5, "length_penalty": 0.5}
    seen = []
    fused = generate(llama, inputs, _spy(fusion, seen), **options)
    moved = sum(not torch.equal(after[:, :-1], before) for before, after in zip(seen, seen[1:], strict=False))
    assert moved > 3, "no row was reordered"
    assert torch.equal(fused, generate(llama, inputs, Forgetful(bound, CONFIG), **options))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampling"])
def test_assisted_decoding_gives_the_tokens_of_recomputation(llama, bound, options):
    assistant = copy.deepcopy(llama)
    with torch.no_grad():  # close enough to be right sometimes, different enough to be rejected sometimes
        noise = torch.Generator().manual_seed(3)
        weight = assistant.lm_head.weight
        weight.add_(torch.randn(weight.shape, generator=noise) * weight.std() * 0.4)
    inputs = prompts(rows=1)
    fusion = CalibFusion(bound, CONFIG)
    seen = []
    fused = generate(llama, inputs, _spy(fusion, seen), assistant_model=assistant, **options)
    lengths = [ids.shape[1] for ids in seen]
    assert any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)), "nothing was repeated or rolled back"
    again = generate(llama, inputs, Forgetful(bound, CONFIG), assistant_model=assistant, **options)
    assert torch.equal(fused, again)
    assert not torch.equal(fused, generate(llama, inputs, assistant_model=assistant, **options))
    if not options:
        assert torch.equal(fused, generate(llama, inputs, fusion))  # assistance does not change greedy tokens


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampling"])
def test_prompt_lookup_gives_the_tokens_of_recomputation(llama, bound, options):
    inputs = prompts(rows=1)
    inputs = {name: value.repeat(1, 3) for name, value in inputs.items()}  # something to look up
    fusion = CalibFusion(bound, CONFIG)
    fused = generate(llama, inputs, fusion, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(fused, generate(llama, inputs, Forgetful(bound, CONFIG), prompt_lookup_num_tokens=4, **options))
    if not options:
        assert torch.equal(fused, generate(llama, inputs, fusion))


def _spy(fusion, seen):
    class Spy(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return fusion(input_ids, scores)

    return Spy()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_gives_the_tokens_of_its_rows_one_by_one(request, bound, family):
    model, inputs = request.getfixturevalue(family), prompts(rows=4, padded=True)
    together = generate(model, inputs, CalibFusion(bound, CONFIG))
    for row in range(4):
        ids = inputs["input_ids"][row : row + 1, 2 * row :]
        alone = generate(model, {"input_ids": ids}, CalibFusion(bound, CONFIG))[0, ids.shape[1] :]
        assert torch.equal(together[row, 9 : 9 + len(alone)], alone)
        assert (together[row, 9 + len(alone) :] == PAD).all()


def test_finished_rows_do_not_disturb_the_others(llama, bound):
    inputs = prompts(rows=4)
    free = generate(llama, inputs, CalibFusion(bound, CONFIG), eos_token_id=EOS)
    stop = int(free[0, 9 + 6])  # a token that at least one row says soon
    fusion = CalibFusion(bound, CONFIG)
    stopped = generate(llama, inputs, fusion, eos_token_id=stop)
    assert (stopped[:, 9:] == PAD).any(), "no row finished early"
    assert not (stopped[:, -1] == PAD).all()
    assert torch.equal(stopped, generate(llama, inputs, Forgetful(bound, CONFIG), eos_token_id=stop))


def test_one_forward_of_the_body_per_new_token(llama, bound):
    fusion = CalibFusion(copy.copy(bound), CONFIG)
    fed = counting_rebuilds(fusion)
    out = generate(llama, prompts(rows=2), fusion, eos_token_id=None)
    assert fed == [10] + [1] * (NEW - 1)
    assert out.shape[1] == 9 + NEW


def test_beams_feed_one_token_per_step(llama, bound):
    fusion = CalibFusion(copy.copy(bound), CONFIG)
    fed = counting_rebuilds(fusion)
    generate(llama, prompts(rows=2), fusion, num_beams=4, eos_token_id=None)
    assert fed == [10] + [1] * (NEW - 1)


def test_inputs_embeds_start(llama, bound):
    inputs = prompts(rows=2)
    embeds = {"inputs_embeds": llama.get_input_embeddings()(inputs["input_ids"])}
    fused = generate(llama, embeds, CalibFusion(bound, CONFIG), eos_token_id=None)
    assert fused.shape[1] == NEW
    assert torch.equal(fused, generate(llama, embeds, Forgetful(bound, CONFIG), eos_token_id=None))
    assert not torch.equal(fused, generate(llama, embeds, eos_token_id=None))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 4}], ids=["greedy", "sampling", "beams"])
def test_encoder_decoder(t5, bound, options):
    inputs = prompts(rows=3, padded=True)
    fused = generate(t5, inputs, CalibFusion(bound, CONFIG), **options)
    expected = generate(t5, inputs, Forgetful(bound, CONFIG), **options)
    assert torch.equal(fused, expected)
    plain = generate(t5, inputs, **options)
    assert fused.shape != plain.shape or not torch.equal(fused, plain)


def test_one_object_for_many_generations_of_different_shapes(llama, gpt2, bound):
    fusion = CalibFusion(bound, CONFIG)
    for seed, (model, rows, length, options) in enumerate(
        [
            (llama, 3, 9, {}),
            (gpt2, 3, 9, {"num_beams": 3}),
            (llama, 1, 20, {"do_sample": True}),
            (gpt2, 5, 4, {}),
            (llama, 2, 9, {"do_sample": True, "num_return_sequences": 2}),
            (llama, 3, 1, {}),
            (llama, 3, 9, {"max_new_tokens": 1}),
        ]
    ):
        inputs = prompts(rows, length, seed=seed % 2)
        assert torch.equal(
            generate(model, inputs, fusion, **options), generate(model, inputs, Forgetful(bound, CONFIG), **options)
        )


def test_two_objects_take_turns(llama, bound):
    other_bound, other_config = make_bound(seed=1, strength=3.0), FusionConfig(alpha=6.0, one_sided=False)
    first, second = CalibFusion(bound, CONFIG), CalibFusion(other_bound, other_config)
    inputs = prompts()
    both = generate(llama, inputs, first, second)
    fresh = (Forgetful(bound, CONFIG), Forgetful(other_bound, other_config))
    assert torch.equal(both, generate(llama, inputs, *fresh))
    assert not torch.equal(both, generate(llama, inputs, first))


def test_generations_step_by_step_in_turns(llama, bound):
    fusion = CalibFusion(bound, CONFIG)
    one, two = prompts(rows=2, seed=1), prompts(rows=3, seed=2)
    for inputs in (one, two, one, two):
        fused = generate(llama, inputs, fusion, max_new_tokens=5)
        assert torch.equal(fused, generate(llama, inputs, Forgetful(bound, CONFIG), max_new_tokens=5))


def test_second_turn_of_a_chat_reuses_the_first(llama, bound, monkeypatch):
    monkeypatch.setattr(KeyValueRing, "slack", 64)
    fusion = CalibFusion(copy.copy(bound), CONFIG)
    first = generate(llama, prompts(rows=1), fusion, eos_token_id=None)
    follow_up = torch.cat([first, prompts(rows=1, length=6, seed=4)["input_ids"]], dim=1)
    fed = counting_rebuilds(fusion)
    second = generate(llama, {"input_ids": follow_up}, fusion, eos_token_id=None)
    assert fed[0] == 7, "the last token of the first turn and the six new ones"
    assert torch.equal(second, generate(llama, {"input_ids": follow_up}, Forgetful(bound, CONFIG), eos_token_id=None))


def test_long_generation_past_window_and_slack(llama, bound):
    inputs, fusion = prompts(rows=2, padded=True), CalibFusion(bound, CONFIG)
    fused = generate(llama, inputs, fusion, max_new_tokens=200, eos_token_id=None)
    assert fusion._rows(bound).session.memory_bytes == 2 * 2 * 2 * 32 * (8 + KeyValueRing.slack) * 4
    expected = generate(llama, inputs, Forgetful(bound, CONFIG), max_new_tokens=200, eos_token_id=None)
    assert torch.equal(fused, expected)


def test_alpha_zero_leaves_the_tokens_as_they_are(llama, bound):
    fusion, inputs = CalibFusion(bound, FusionConfig(alpha=0.0)), prompts(padded=True)
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        assert torch.equal(generate(llama, inputs, fusion, **options), generate(llama, inputs, **options))
    assert fusion.calls > 0


def test_output_logits_are_not_written_to(llama, bound):
    options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 1}
    fused = generate(llama, prompts(), CalibFusion(bound, CONFIG), **options)
    plain = generate(llama, prompts(), **options)
    assert torch.equal(fused.logits[0], plain.logits[0])


def test_bfloat16_target(llama, bound):
    model = copy.deepcopy(llama).to(torch.bfloat16)
    fused = generate(model, prompts(), CalibFusion(bound, CONFIG))
    assert torch.equal(fused, generate(model, prompts(), Forgetful(bound, CONFIG)))


def test_pipeline_takes_the_processor(llama, bound, byte_level_tokenizer, wrap_tokenizer, tiny_llama):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    model = tiny_llama(len(tokenizer))
    guide = bound.calibrator.bind(tokenizer, use_disk_cache=False)
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False, "batch_size": 2}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["The weather is", "A dog and a", "Once"]

    def say(processor):
        extra = {} if processor is None else {"logits_processor": [processor]}
        return [answer[0]["generated_text"] for answer in pipe(texts, **options, **extra)]

    fusion = CalibFusion(guide, CONFIG)
    with fusion.required():
        fused = say(fusion)
    assert fused == say(Forgetful(guide, CONFIG))
    assert fused != say(None)


def _small_paged_cache(model):
    """Options of `generate_batch` that keep it from taking most of the machine's memory for its cache."""
    generation = copy.deepcopy(model.generation_config)
    generation.max_new_tokens, generation.num_blocks, generation.max_batch_tokens = 3, 8, 32
    if not IS_V5:
        return {"generation_config": generation}
    cache = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    return {"generation_config": generation, "continuous_batching_config": cache}


def test_required_raises_where_generate_batch_drops_the_processor(llama, bound):
    fusion, options = CalibFusion(bound, CONFIG), _small_paged_cache(llama)
    ids = prompts(rows=1)["input_ids"].tolist()
    with pytest.raises(FusionNotAppliedError, match="dropped"), fusion.required():
        llama.generate_batch(ids, logits_processor=[fusion], progress_bar=False, **options)
    assert fusion.calls == 0


@pytest.mark.skipif(not IS_V5, reason="transformers 4 refuses cache_implementation='paged'")
def test_required_raises_where_a_paged_cache_drops_the_processor(llama, bound):
    fusion, options = CalibFusion(bound, CONFIG), _small_paged_cache(llama)
    with pytest.raises(FusionNotAppliedError, match="dropped"), fusion.required():
        llama.generate(**prompts(rows=1), logits_processor=[fusion], cache_implementation="paged", **options)
    assert fusion.calls == 0


def test_required_is_silent_where_the_processor_ran(llama, bound):
    fusion = CalibFusion(bound, CONFIG)
    with fusion.required() as same:
        generate(llama, prompts(), fusion, max_new_tokens=2)
    assert same is fusion
    assert fusion.calls == 2


def test_continuous_batching_is_refused_by_declaration():
    assert CalibFusion.supports_continuous_batching is False
