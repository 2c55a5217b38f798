"""Any causal LM as calibrator: cached decoding gives the tokens of recomputation, in lock-step and projected."""

import copy

import pytest
import torch
import transformers
from tiny_calibrators import PAD, Forgetful, make_calibrator

from calibfuse.calibrator import Calibrator
from calibfuse.errors import CheckpointError, InputError, MissingHeadError, VocabularyError, VocabularyMismatchError
from calibfuse.fusion import FusionConfig
from calibfuse.guides.causal_lm import BoundCausalLM, CausalLMCalibrator, same_ids
from calibfuse.prefix_cache import RowSession
from calibfuse.processor import CalibFusion
from calibfuse.vocabulary import Vocabulary

NEW = 10
CONTRAST = FusionConfig(alpha=3.0, candidates=60, max_shift=20.0)
GEOMETRIC = FusionConfig(mode="geometric", alpha=0.6, candidates=60)


def calm(model, divisor=2.0):
    """A model whose next-token distribution has more than one likely token."""
    with torch.no_grad():
        model.get_output_embeddings().weight.div_(divisor)
    return model


@pytest.fixture(scope="module")
def target_tokenizer(byte_level_tokenizer, wrap_tokenizer):
    return wrap_tokenizer(byte_level_tokenizer)


@pytest.fixture(scope="module")
def target(tiny_llama, target_tokenizer):
    return tiny_llama(len(target_tokenizer), seed=3)


@pytest.fixture(scope="module")
def lock_step(tiny_gpt2, target_tokenizer):
    models = [calm(tiny_gpt2(len(target_tokenizer), seed=seed)) for seed in (1, 2)]
    return CausalLMCalibrator(models[0], target_tokenizer, reference=models[1]).bind(target_tokenizer)


@pytest.fixture(scope="module")
def projected(tiny_llama, byte_fallback_tokenizer, wrap_tokenizer, target_tokenizer):
    own = wrap_tokenizer(byte_fallback_tokenizer)
    models = [calm(tiny_llama(len(own), seed=seed), 4.0) for seed in (1, 2)]
    return CausalLMCalibrator(models[0], own, reference=models[1]).bind(target_tokenizer)


@pytest.fixture(params=["lock_step", "projected"])
def bound(request):
    return request.getfixturevalue(request.param)


TEXTS = ["The weather in the north was", "A dog", "Once upon a time there"]


@pytest.fixture(scope="module")
def prompts(target_tokenizer):
    return dict(target_tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False))


def generate(model, inputs, *processors, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": None} | options
    return model.generate(**inputs, **options, logits_processor=list(processors))


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "with an end": {"eos_token_id": 1, "do_sample": True, "temperature": 3.0},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_decoding_gives_the_tokens_of_recomputation(bound, target, prompts, options):
    config = GEOMETRIC if options.get("do_sample") else CONTRAST
    fusion = CalibFusion(bound, config)
    fused = generate(target, prompts, fusion, **options)
    assert torch.equal(fused, generate(target, prompts, Forgetful(bound, config), **options))
    plain = generate(target, prompts, **options)
    assert fused.shape != plain.shape or not torch.equal(fused, plain)
    assert torch.equal(generate(target, prompts, fusion, **options), fused)  # the same object once more


def test_beams_are_reordered_and_still_agree(bound, target, prompts):
    seen, fusion = [], CalibFusion(bound, CONTRAST)

    class Spy(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.clone())
            return fusion(input_ids, scores)

    options = {"num_beams": 4, "length_penalty": 0.5}
    fused = generate(target, prompts, Spy(), **options)
    assert any(not torch.equal(after[:, :-1], before) for before, after in zip(seen, seen[1:], strict=False))
    assert torch.equal(fused, generate(target, prompts, Forgetful(bound, CONTRAST), **options))


def test_assisted_decoding_rolls_back(bound, target, prompts):
    assistant = copy.deepcopy(target)
    with torch.no_grad():
        weight = assistant.lm_head.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight.std() * 0.4)
    inputs = {name: each[:1] for name, each in prompts.items()}
    fused = generate(target, inputs, CalibFusion(bound, CONTRAST), assistant_model=assistant)
    assert torch.equal(fused, generate(target, inputs, CalibFusion(bound, CONTRAST)))


def test_a_batch_gives_the_tokens_of_its_rows_one_by_one(bound, target, prompts):
    together = generate(target, prompts, CalibFusion(bound, CONTRAST))
    for row, mask in enumerate(prompts["attention_mask"]):
        ids = prompts["input_ids"][row : row + 1, int((mask == 0).sum()) :]
        alone = generate(target, {"input_ids": ids}, CalibFusion(bound, CONTRAST))
        assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


def test_any_order_of_prefixes_gives_what_recomputation_gives(bound):
    """Growing, cut, exchanged, doubled and dropped rows, special tokens in the middle, and the empty prefix."""
    choose = torch.Generator().manual_seed(5)
    session, nothing = RowSession(bound), torch.zeros(0)
    ids = torch.randint(0, bound.target_vocab_size, (2, 4), generator=choose)
    for _ in range(40):
        action = int(torch.randint(0, 6, (), generator=choose))
        if action == 0:
            ids = ids[:, : int(torch.randint(0, ids.shape[1] + 1, (), generator=choose))]
        elif action == 1:
            ids = ids[torch.randint(0, len(ids), (int(torch.randint(1, 5, (), generator=choose)),), generator=choose)]
        else:
            new = torch.randint(0, bound.target_vocab_size, (len(ids), 1 + action % 2), generator=choose)
            ids = torch.cat([ids, torch.where(new % 7 == 0, new % 3, new)], dim=1)
        said, _ = session.step(ids, nothing)
        fresh, _ = RowSession(bound).step(ids, nothing)
        for head in bound.heads:
            got, expected = (bound.normalise(each.log_scores(head)) for each in (said, fresh))
            assert torch.allclose(got.exp(), expected.exp(), atol=1e-4)


def test_texts_by_key_come_and_go(bound):
    """As in a serving engine: rows of different lengths that join, leave, pause, go back and stand in any order."""
    choose = torch.Generator().manual_seed(7)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=choose))

    session, texts = bound.session(), {}
    for number in range(40):
        if len(texts) < 2 or (draw(0, 4) == 0 and len(texts) < 5):
            texts[number] = [draw(3, bound.target_vocab_size) for _ in range(draw(1, 12))]
        for key in list(texts):
            match draw(0, 8):
                case 0:
                    texts[key] = texts[key][: draw(0, len(texts[key]) + 1)]
                case 1 if len(texts) > 2:
                    del texts[key]
                    session.drop([key])
                case 2:
                    session.copy({(key, number): key})
                    texts[(key, number)] = [*texts[key], draw(0, bound.target_vocab_size)]
                case _:
                    texts[key] = [*texts[key], draw(0, bound.target_vocab_size)]
        asked = [key for key in texts if draw(0, 6)] or list(texts)
        said = session.step([(key, texts[key]) for key in asked])
        for head in bound.heads:
            scores = bound.normalise(said.log_scores(head)).exp()
            for row, key in enumerate(asked):
                alone = bound.normalise(bound.session().step([("x", texts[key])]).log_scores(head)).exp()
                assert torch.allclose(scores[row], alone[0], atol=2e-4)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_step_that_breaks_off_leaves_nothing_wrong_behind(bound, monkeypatch, at):
    """Ctrl-C in a forward of the LM, then an older text goes on."""
    from calibfuse.guides.kv_cache import CachedLM

    ids = torch.randint(3, bound.target_vocab_size, (2, 14), generator=torch.Generator().manual_seed(1)).tolist()
    session, feed, calls = bound.session(), CachedLM.feed, [0]
    session.step([(key, ids[key][:9]) for key in (0, 1)])

    def breaking(self, *arguments, **options):
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return feed(self, *arguments, **options)

    monkeypatch.setattr(CachedLM, "feed", breaking)

    def go_on():
        for length in (10, 12, 13):
            session.step([(key, ids[key][:length]) for key in (0, 1)])

    with pytest.raises(KeyboardInterrupt):
        go_on()
    monkeypatch.setattr(CachedLM, "feed", feed)
    texts = [[*ids[0][:8], 7], ids[1][:11]]
    said, alone = session.step([(key, texts[key]) for key in (0, 1)]), bound.session()
    expected = alone.step([(key, texts[key]) for key in (0, 1)])
    for head in bound.heads:
        one, other = (bound.normalise(each.log_scores(head)).exp() for each in (said, expected))
        assert torch.allclose(one, other, atol=1e-4)


def test_whole_sequences_say_what_steps_say(bound, prompts):
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    whole = bound.log_probs(ids, mask)
    twin = bound.reference_log_probs(ids, mask)
    assert whole.shape == (*ids.shape, bound.target_vocab_size)
    assert torch.allclose(whole.exp().sum(-1), torch.ones(ids.shape), atol=1e-4)
    assert not torch.allclose(whole, twin, atol=0.1)
    session = RowSession(bound)
    for length in range(1, ids.shape[1] + 1):
        said, _ = session.step(ids[:, :length], torch.zeros(0))
        assert torch.allclose(
            bound.normalise(said.log_scores("calibrator")).exp(), whole[:, length - 1].exp(), atol=1e-4
        )
        some = torch.randint(3, bound.target_vocab_size, (len(ids), 9))
        assert torch.equal(said.log_scores("reference", some), said.log_scores("reference").gather(-1, some))
    assert torch.allclose(bound.first_log_probs().exp().sum(), torch.ones(()), atol=1e-4)


def test_fuse_logits_says_what_the_steps_say(bound, target, prompts):
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    with torch.no_grad():
        logits = target(**prompts).logits
    whole = CalibFusion(bound, CONTRAST).fuse_logits(ids, logits, mask)
    steps = CalibFusion(bound, CONTRAST)
    for at in range(3, ids.shape[1]):
        assert torch.allclose(steps(ids[:, : at + 1], logits[:, at]).exp(), whole[:, at].exp(), atol=1e-4)


def test_lock_step_is_the_model_itself(lock_step, target_tokenizer):
    ids = torch.tensor([target_tokenizer("The weather in the north").input_ids])
    assert lock_step.lock_step
    model = lock_step.calibrator.models["calibrator"]
    with torch.no_grad():
        logits = model(torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids], dim=1)).logits[:, 1:]
    logits[..., :3] = -torch.inf
    expected = logits.softmax(dim=-1) * (1 - 1e-4)
    assert torch.allclose(lock_step.log_probs(ids).exp()[..., 3:], expected[..., 3:], atol=1e-5)
    begun = torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids], dim=1)  # a begin mark changes nothing
    assert torch.allclose(lock_step.log_probs(begun)[:, 1:], lock_step.log_probs(ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["lock_step", "projected"])
def test_texts_beyond_the_length_of_the_model(kind, request, tiny_gpt2, wrap_tokenizer, target_tokenizer):
    own = target_tokenizer if kind == "lock_step" else wrap_tokenizer(request.getfixturevalue("unigram_tokenizer"))
    model = calm(tiny_gpt2(len(own), n_positions=24 if kind == "lock_step" else 68))
    bound = CausalLMCalibrator(model, own).bind(target_tokenizer)
    text = "The weather in the north was cold and dry for weeks. " * (2 if kind == "lock_step" else 4)
    text += "x" * 70 + "yz" * 40  # longer than any word may be
    ids = torch.tensor([target_tokenizer(text).input_ids])
    whole, session = bound.log_probs(ids), RowSession(bound)
    for length in range(1, ids.shape[1] + 1):
        said, _ = session.step(ids[:, :length], torch.zeros(0))
        assert torch.allclose(
            bound.normalise(said.log_scores("calibrator")).exp(), whole[0, length - 1].exp(), atol=1e-4
        )


def test_projected_steps_read_few_tokens(projected, target, prompts, monkeypatch):
    """Nothing is read from the beginning again; what is fed hangs on the open word alone."""
    from calibfuse.guides.kv_cache import CachedLM

    fed, feed = [], CachedLM.feed
    monkeypatch.setattr(
        CachedLM,
        "feed",
        lambda self, ids, *rest, **options: fed.append(ids.shape[1]) or feed(self, ids, *rest, **options),
    )
    text = torch.tensor([[int(each) for each in prompts["input_ids"][0]] * 6])
    session = RowSession(projected)
    for length in range(20, text.shape[1]):
        session.step(text[:, :length], torch.zeros(0))
    assert max(fed[4:]) < 24


def test_without_a_twin_there_is_one_head(tiny_gpt2, target_tokenizer):
    bound = CausalLMCalibrator(tiny_gpt2(len(target_tokenizer)), target_tokenizer).bind(target_tokenizer)
    assert bound.heads == ("calibrator",)
    assert bound.calibrator.config.fusion["mode"] == "geometric"
    with pytest.raises(MissingHeadError, match="reference="):
        bound.reference_log_probs(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(VocabularyMismatchError, match="outside the vocabulary"):
        bound.log_probs(torch.tensor([[99_999]]))
    with pytest.raises(VocabularyMismatchError, match="attention_mask has shape"):
        bound.log_probs(torch.tensor([[5]]), torch.ones(1, 2))


def test_ids_without_an_embedding_are_never_read(tiny_gpt2, byte_level_tokenizer, wrap_tokenizer, target_tokenizer):
    """A tokenizer may know more tokens than the model; words are then spelled by others."""
    own = wrap_tokenizer(byte_level_tokenizer)
    own.add_tokens([" weather"])
    bound = CausalLMCalibrator(calm(tiny_gpt2(len(own) - 1)), own).bind(target_tokenizer)
    assert not bound.lock_step
    ids = torch.tensor([target_tokenizer("The weather in").input_ids])
    assert torch.isfinite(bound.log_probs(ids)).all()


def test_a_model_that_reads_too_little_is_refused(tiny_gpt2, unigram_tokenizer, wrap_tokenizer, target_tokenizer):
    own = wrap_tokenizer(unigram_tokenizer)
    with pytest.raises(InputError, match="reads only 32 tokens"):
        CausalLMCalibrator(tiny_gpt2(len(own), n_positions=32), own).bind(target_tokenizer)


def test_tables_are_counted_and_kept_for_copies(projected, lock_step):
    assert projected.memory_bytes > 8 * projected.target_vocab_size
    assert lock_step.memory_bytes < 10_000
    for bound in (projected, lock_step):
        copied = copy.copy(bound)
        copied.make_tables()
        assert copied.memory_bytes == bound.memory_bytes


# ---- checkpoints


@pytest.fixture
def checkpoint(tmp_path, tiny_gpt2, target_tokenizer):
    tiny_gpt2(len(target_tokenizer)).save_pretrained(tmp_path / "lm")
    target_tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_a_transformers_checkpoint_is_a_calibrator(checkpoint, target, target_tokenizer, prompts):
    calibrator = Calibrator.from_pretrained(checkpoint, reference=checkpoint)
    assert isinstance(calibrator, CausalLMCalibrator)
    assert calibrator.heads == ("calibrator", "reference")
    assert isinstance(calibrator.bind(target_tokenizer), BoundCausalLM)
    fusion = CalibFusion.from_pretrained(checkpoint, tokenizer=target_tokenizer)
    assert fusion.config.mode == "geometric"
    with fusion.required():
        generate(target, prompts, fusion, max_new_tokens=2)
    twin = CalibFusion.from_pretrained(checkpoint, reference=checkpoint, tokenizer=target_tokenizer, alpha=5.0)
    assert twin.config.mode == "contrast"
    # a model minus itself is nothing
    assert torch.equal(generate(target, prompts, twin), generate(target, prompts))


def test_the_twin_lies_in_the_checkpoint(tmp_path, tiny_gpt2, target_tokenizer, target, prompts):
    models = [tiny_gpt2(len(target_tokenizer), seed=seed) for seed in (1, 2)]
    saved = CausalLMCalibrator(models[0], target_tokenizer, reference=models[1])
    saved.save_pretrained(tmp_path / "lm")
    assert (tmp_path / "lm" / "reference" / "model.safetensors").is_file()
    assert not list((tmp_path / "lm").glob(".*"))
    loaded = Calibrator.from_pretrained(tmp_path / "lm")
    assert loaded.heads == ("calibrator", "reference")
    assert loaded.fingerprint == saved.fingerprint
    fusion = CalibFusion.from_pretrained(tmp_path / "lm", tokenizer=target_tokenizer)
    assert fusion.config.mode == "contrast"
    CausalLMCalibrator(models[0], target_tokenizer).save_pretrained(tmp_path / "lm")  # a twin of another model goes
    assert Calibrator.from_pretrained(tmp_path / "lm").heads == ("calibrator",)


def test_facts_and_recommended_fusion_travel_in_the_config(checkpoint):
    from calibfuse.evaluation.budget import write_recommendation
    from calibfuse.inspection import describe_calibrator

    write_recommendation(checkpoint, checkpoint, {"mode": "geometric", "alpha": 0.25})
    calibrator = Calibrator.from_pretrained(checkpoint)
    assert calibrator.config.fusion == {"mode": "geometric", "alpha": 0.25}
    facts = describe_calibrator(calibrator)
    assert facts["parameters"] == {"calibrator": sum(p.numel() for _, p in calibrator.named_parameters())}
    assert facts["shape"]["num_hidden_layers"] == 2
    assert facts["training"]["model_type"] == "gpt2"


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, tiny_gpt2, target_tokenizer):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Cannot write the model to"):
        CausalLMCalibrator(tiny_gpt2(len(target_tokenizer)), target_tokenizer).save_pretrained(tmp_path / "file")


def test_no_tokenizer(tmp_path, tiny_gpt2, target_tokenizer):
    tiny_gpt2(len(target_tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="came without a tokenizer"):
        Calibrator.from_pretrained(tmp_path).bind(target_tokenizer)


def test_pickled_weights_are_refused(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Expected weights in the safetensors format .*\(a pickle can run code"):
        Calibrator.from_pretrained(checkpoint)


def test_damaged_and_incomplete_weights(checkpoint):
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mlp.c_fc.weight and 0 more are missing"):
        Calibrator.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Calibrator.from_pretrained(checkpoint)


def test_models_that_cannot_be_calibrators(tmp_path, target_tokenizer):
    transformers.T5Config(vocab_size=99).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        Calibrator.from_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=len(target_tokenizer), **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    with pytest.raises(InputError, match="cannot be followed token by token"):
        CausalLMCalibrator(model, target_tokenizer).bind(target_tokenizer)


def test_a_reference_must_be_a_twin(checkpoint, tiny_gpt2, target_tokenizer):
    with pytest.raises(InputError, match="same vocabulary"):
        CausalLMCalibrator(tiny_gpt2(600), target_tokenizer, reference=tiny_gpt2(500))
    make_calibrator().save_pretrained(checkpoint.parent / "universal")
    with pytest.raises(InputError, match="reference= is for causal"):
        Calibrator.from_pretrained(checkpoint.parent / "universal", reference=checkpoint)


def test_same_ids_looks_at_text_alone():
    plain = Vocabulary.from_byte_strings([b"a", b"b", None])
    assert same_ids(plain, Vocabulary.from_byte_strings([b"a", b"b"]))
    assert not same_ids(plain, Vocabulary.from_byte_strings([b"b", b"a", None]))
    assert not same_ids(plain, Vocabulary.from_byte_strings([b"a", b"b", None, b"c"]))
