"""Mode "embedding" equals the same fusion done inside the model, whatever its output head does.

The oracle is a hook on the input of the target's output head: h becomes (1 - a) h + a LN(t A) there, with t computed
from scratch by hooking the calibrator's last linear map. No formula of the implementation is used on that side.
"""

import contextlib
import dataclasses

import pytest
import torch
import transformers
from tiny_calibrators import EOS, PAD, make_bound

from calibfuse.embedding.alignment import Alignment, AlignmentMetadata, sketch_of
from calibfuse.embedding.fusion import EmbeddingFusion, aligned_states
from calibfuse.embedding.output_head import OutputHead, find_output_head
from calibfuse.errors import InputError, MissingHeadError, VocabularyMismatchError
from calibfuse.fusion import FusionConfig, fuse
from calibfuse.processor import CalibFusion

VOCAB = 96
ALPHA = 0.35


@pytest.fixture(scope="module")
def bound():
    return make_bound(size=VOCAB)


# ---- targets: random, with logits of about 5 in size


def build(model_class, config, spread=0.5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=spread)
                elif "bias" in name:
                    parameter.normal_()
    return model


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def shape(**changes):
    return {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128, eos_token_id=EOS
    )
    return build(transformers.GPT2LMHeadModel, config)


def llama(tied):
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**shape(tie_word_embeddings=tied)))


def llama_with_padded_head():
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**shape(vocab_size=VOCAB + 32)))


def phi_with_head_bias():
    return build(transformers.PhiForCausalLM, transformers.PhiConfig(**shape(head_dim=None)))


def gemma2(cap=8.0):
    config = transformers.Gemma2Config(
        **shape(final_logit_softcapping=cap, query_pre_attn_scalar=16, sliding_window=64)
    )
    return build(transformers.Gemma2ForCausalLM, config, spread=0.4)


def recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        **shape(
            head_dim=None,
            max_position_embeddings=None,
            logits_soft_cap=9.0,
            lru_width=32,
            num_hidden_layers=3,
            attention_window_size=64,
        )
    )
    return build(transformers.RecurrentGemmaForCausalLM, config, spread=0.4)


def cohere():
    config = transformers.CohereConfig(**shape(head_dim=None, logit_scale=0.25))
    return build(transformers.CohereForCausalLM, config, spread=1.0)


def granite():
    config = transformers.GraniteConfig(**shape(head_dim=None, logits_scaling=3.0, embedding_multiplier=2.0))
    return build(transformers.GraniteForCausalLM, config, spread=1.0)


PLAIN = {
    "GPT-2, tied": gpt2,
    "Llama, tied": lambda: llama(True),
    "Llama, untied": lambda: llama(False),
    "Phi, bias in the head": phi_with_head_bias,
    "Llama, head wider than the tokenizer": llama_with_padded_head,
}
CHANGED = {
    "Gemma 2, soft cap": gemma2,
    "RecurrentGemma, soft cap of another name": recurrent_gemma,
    "Cohere, factor": cohere,
    "Granite, divisor": granite,
}
ALL = PLAIN | CHANGED
_built = {}


@pytest.fixture(params=ALL, ids=list(ALL))
def target(request):
    return _built.setdefault(request.param, ALL[request.param]())


def model(name):
    return _built.setdefault(name, ALL[name]())


# ---- the oracle


def make_alignment(bound, hidden_size, seed=0):
    width = bound.calibrator.config.width
    metadata = AlignmentMetadata(
        target="a random model", calibrator_fingerprint=bound.calibrator.fingerprint,
        vocabulary_fingerprint=bound.vocabulary.fingerprint, width=width, hidden_size=hidden_size,
        common_tokens=93, held_out_tokens=0, epochs=1, seed=seed, held_out_loss=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(VOCAB, hidden_size, generator=generator)
    matrix = torch.randn(width, hidden_size, generator=generator)
    return Alignment(matrix, sketch_of(rows, torch.arange(3, VOCAB)), metadata)


def calibrator_states(bound, input_ids):
    """What the query of the head "calibrator" reads: [batch, length, width]."""
    seen = []
    query = bound.calibrator.heads["calibrator"].query
    handle = query.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    bound.sequence(input_ids).log_scores("calibrator")
    handle.remove()
    return seen[0]


@contextlib.contextmanager
def fused_inside(target, bound, alignment, input_ids, mix):
    """The model with `mix(h, LN(t A))` before its output head."""
    layer_norm = torch.nn.LayerNorm(alignment.matrix.shape[1], elementwise_affine=False)
    guide = layer_norm(calibrator_states(bound, input_ids) @ alignment.matrix)
    head = target.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, inputs: (mix(inputs[0], guide),))
    yield
    handle.remove()


def published(alpha):
    return lambda h, g: (1 - alpha) * h + alpha * g


@torch.no_grad()
def inside_log_probs(target, bound, alignment, input_ids, mix):
    with fused_inside(target, bound, alignment, input_ids, mix):
        return target(input_ids).logits.float().log_softmax(dim=-1)


def linear(weight):
    """A head of this weight, without bias."""
    made = torch.nn.Linear(*reversed(weight.shape), bias=False)
    made.weight.data = weight
    return made


def make_fusion(target, bound, **options):
    hidden_size = target.get_output_embeddings().weight.shape[1]
    config = FusionConfig(**{"mode": "embedding", "alpha": ALPHA} | options)
    return CalibFusion(bound, config, alignment=make_alignment(bound, hidden_size), target=target)


def random_ids(rows=2, length=11, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, tolerance=1e-5):
    assert float((found - expected).abs().max()) < tolerance


# ---- equality


@torch.no_grad()
def test_whole_sequences_equal_fusion_inside_the_model(target, bound):
    ids = random_ids()
    fusion = make_fusion(target, bound)
    logits = target(ids).logits
    alignment = make_alignment(bound, fusion._embedding.head.linear.in_features)
    expected = inside_log_probs(target, bound, alignment, ids, published(ALPHA))
    fused = fusion.fuse_logits(ids, logits)
    assert_close(fused, expected, tolerance=1e-4 if fusion._embedding.head.soft_cap else 1e-5)
    assert float((fused - logits.log_softmax(dim=-1)).abs().max()) > 0.1, "the fusion changes nothing"
    assert_close(fused.logsumexp(dim=-1), torch.zeros(ids.shape))


@torch.no_grad()
def test_greedy_generation_with_a_cache_equals_fusion_inside_the_model(target, bound):
    """Every step recomputed from scratch, with the fusion in the model, against generate() with both caches."""
    ids, new = random_ids(), 12
    fusion = make_fusion(target, bound)
    alignment = make_alignment(bound, fusion._embedding.head.linear.in_features)
    expected, scores = ids, []
    for _ in range(new):
        scores.append(inside_log_probs(target, bound, alignment, expected, published(ALPHA))[:, -1])
        expected = torch.cat([expected, scores[-1].argmax(dim=-1, keepdim=True)], dim=1)
    result = target.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, use_cache=True, pad_token_id=PAD,
        eos_token_id=10_000, logits_processor=[fusion], output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(result.sequences, expected)
    for found, wanted in zip(result.scores, scores, strict=True):
        assert_close(found, wanted, tolerance=2e-4)


@torch.no_grad()
def test_without_hidden_temperature_the_targets_state_keeps_weight_one(target, bound):
    ids = random_ids()
    fusion = make_fusion(target, bound, hidden_temperature=False)
    alignment = make_alignment(bound, fusion._embedding.head.linear.in_features)
    expected = inside_log_probs(target, bound, alignment, ids, lambda h, g: h + ALPHA / (1 - ALPHA) * g)
    tolerance = 1e-4 if fusion._embedding.head.soft_cap else 1e-5
    assert_close(fusion.fuse_logits(ids, target(ids).logits), expected, tolerance=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["GPT-2, tied", "Llama, untied", "Cohere, factor"])
def test_hidden_temperature_is_a_temperature(name, bound):
    """Without a bias or a cap, published = the other at temperature 1 / (1 - alpha)."""
    target, ids = model(name), random_ids()
    logits = target(ids).logits
    cold = make_fusion(target, bound, hidden_temperature=False).fuse_logits(ids, logits)
    published_log_probs = make_fusion(target, bound).fuse_logits(ids, logits)
    assert_close((cold * (1 - ALPHA)).log_softmax(dim=-1), published_log_probs)
    entropy = -(published_log_probs.exp() * published_log_probs).sum(dim=-1)
    assert (entropy > -(cold.exp() * cold).sum(dim=-1)).all()


@torch.no_grad()
def test_naive_formula_on_logits():
    """The formula of the paper's code, written out for one position of a head without bias."""
    generator = torch.Generator().manual_seed(0)
    weight, h = torch.randn(7, 4, generator=generator), torch.randn(4, generator=generator)
    t, matrix = torch.randn(3, generator=generator), torch.randn(3, 4, generator=generator)
    mapped = t @ matrix
    g = (mapped - mapped.mean()) / (mapped.var(unbiased=False) + 1e-5).sqrt()
    head = OutputHead(linear(weight))
    options = {"matrix": matrix, "head": head, "alpha": 0.1}
    assert_close(EmbeddingFusion(**options)(weight @ h, t), (weight @ (0.9 * h + 0.1 * g)).log_softmax(dim=0), 1e-6)
    cold = EmbeddingFusion(hidden_temperature=False, **options)(weight @ h, t)
    assert_close(cold, (weight @ (h + 0.1 / 0.9 * g)).log_softmax(dim=0), 1e-6)


# ---- invariants


@torch.no_grad()
def test_alpha_zero_leaves_the_target(target, bound):
    ids = random_ids()
    logits = target(ids).logits
    assert_close(make_fusion(target, bound, alpha=0.0).fuse_logits(ids, logits), logits.log_softmax(dim=-1), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [*PLAIN, "Cohere, factor", "Granite, divisor"])
@pytest.mark.parametrize("hidden_temperature", [True, False])
def test_log_probabilities_give_what_logits_give(name, hidden_temperature, bound):
    """Beam search hands over log-probabilities."""
    target, ids = model(name), random_ids()
    fusion = make_fusion(target, bound, hidden_temperature=hidden_temperature)
    logits = target(ids).logits
    assert_close(fusion.fuse_logits(ids, logits.log_softmax(dim=-1)), fusion.fuse_logits(ids, logits))


@torch.no_grad()
def test_excluded_tokens_stay_excluded_and_scores_are_not_written_to(target, bound):
    ids = random_ids()
    scores = target(ids).logits[:, -1].clone()
    scores[:, 5:9] = -torch.inf
    scores[:, 9] = torch.finfo(torch.float32).min  # how some models exclude tokens after their head
    before = scores.clone()
    fused = make_fusion(target, bound)(ids, scores)
    assert torch.equal(scores, before)
    assert (fused[:, 5:9] == -torch.inf).all()
    assert (fused[:, 9] < -1e3).all()
    assert fused[:, 10:].isfinite().all()


@pytest.mark.parametrize("name", ["Llama, untied", "Granite, divisor"])
def test_beams_give_the_tokens_of_recomputation(name, bound):
    target, ids = model(name), random_ids(rows=2)

    class Forgetful(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            return make_fusion(target, bound)(input_ids, scores)

    def beams(*processors):
        return target.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=10, pad_token_id=PAD,
            logits_processor=list(processors),
        )  # fmt: skip

    fused = beams(make_fusion(target, bound))
    assert torch.equal(fused, beams(Forgetful()))
    assert not torch.equal(fused, beams())


@torch.no_grad()
def test_left_padding_changes_nothing(bound):
    target = model("Llama, untied")
    fusion = make_fusion(target, bound)
    ids = random_ids(rows=1)
    padded = torch.cat([torch.full((1, 4), PAD), ids], dim=1)
    scores = target(ids).logits[:, -1]
    assert_close(fusion(padded, scores), fusion(ids, scores))


@torch.no_grad()
def test_half_precision_target(bound):
    target = llama(False).to(torch.bfloat16)
    ids = random_ids()
    fusion = make_fusion(target, bound)
    logits = target(ids).logits.float()
    fused = fusion.fuse_logits(ids, logits)
    assert fusion._embedding.head.scale == 1.0
    precise = target.float()
    expected = inside_log_probs(precise, bound, make_alignment(bound, 32), ids, published(ALPHA))
    assert float((fused - expected).abs().mean()) < 0.1  # two layers in half precision lie behind the logits
    # the target moved (to another dtype; a device would be the same) after the fusion was made
    assert_close(fusion.fuse_logits(ids, precise(ids).logits), expected)


# ---- what the head is


def test_the_heads_factor_and_cap_are_found(target):
    name = type(target).__name__
    head = find_output_head(target)
    assert head.soft_cap == {"Gemma2ForCausalLM": 8.0, "RecurrentGemmaForCausalLM": 9.0}.get(name)
    scale = {"CohereForCausalLM": 0.25, "GraniteForCausalLM": 1 / 3}.get(name, 1.0)
    assert head.scale == pytest.approx(scale, rel=1e-6)
    assert (head.linear.bias is not None) == (name == "PhiForCausalLM")


def test_a_head_with_a_factor_of_another_name():
    config = transformers.FalconH1Config(
        **shape(mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8, lm_head_multiplier=0.3)
    )
    head = find_output_head(build(transformers.FalconH1ForCausalLM, config))
    assert (head.linear.in_features, head.soft_cap, head.linear.bias) == (32, None, None)
    assert head.scale == pytest.approx(0.3, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Gemma 2, soft cap", "RecurrentGemma, soft cap of another name", "Cohere, factor"])
def test_undo_and_redo_are_inverse(name):
    target = model(name)
    head = find_output_head(target)
    scores = target(random_ids()).logits
    assert_close(head.redo(head.undo(scores)), scores)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build_target", [lambda: gemma2(6.0), cohere, granite], ids=["soft cap", "factor", "divisor"])
def test_factor_and_cap_are_found_in_half_precision(build_target, dtype):
    target = build_target()
    precise, half = find_output_head(target), find_output_head(target.to(dtype))
    assert half.soft_cap == precise.soft_cap
    assert half.scale == pytest.approx(precise.scale, rel=3e-3)


def test_saturated_scores_are_not_infinite():
    head = OutputHead(linear(torch.eye(4)), soft_cap=5.0)
    scores = torch.tensor([[5.0, -5.0, 4.9999995, 0.0]])
    logits = head.undo(scores)
    assert logits.isfinite().all()
    assert_close(head.redo(logits), scores, 1e-6)


# ---- refusals


def test_a_soft_cap_under_beams_is_refused(bound):
    target, ids = model("Gemma 2, soft cap"), random_ids()
    with pytest.raises(InputError, match=r"soft-caps its logits at 8.*beam search"):
        target.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=4, pad_token_id=PAD,
            logits_processor=[make_fusion(target, bound)],
        )  # fmt: skip


@torch.no_grad()
def test_log_probabilities_with_excluded_tokens_are_refused_under_a_soft_cap(bound):
    target, ids = model("Gemma 2, soft cap"), random_ids()
    scores = target(ids).logits[:, -1].log_softmax(dim=-1)
    scores[:, :20] = -torch.inf
    with pytest.raises(InputError, match="beam search"):
        make_fusion(target, bound)(ids, scores)


@torch.no_grad()
def test_scores_beyond_a_soft_cap_are_refused(bound):
    target, ids = model("Gemma 2, soft cap"), random_ids()
    scores = target(ids).logits[:, -1].clone()
    scores[0, 7] = -11.5
    fusion = make_fusion(target, bound)
    with pytest.raises(InputError, match="soft-caps its logits at 8.*another processor"):
        fusion(ids, scores)


def test_a_target_that_changes_its_logits_otherwise_is_refused(bound):
    class Squared(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits**2
            return output

    target = build(Squared, transformers.LlamaConfig(**shape()))
    with pytest.raises(InputError, match="neither a factor nor a soft cap"):
        find_output_head(target)


def test_a_model_without_an_output_head_is_refused():
    target = transformers.LlamaModel(transformers.LlamaConfig(**shape()))
    with pytest.raises(InputError, match="no output head"):
        find_output_head(target)


def test_the_mode_needs_target_and_alignment(bound):
    config = FusionConfig(mode="embedding")
    with pytest.raises(InputError, match="pass target="):
        CalibFusion(bound, config)
    with pytest.raises(MissingHeadError, match="needs an alignment"):
        CalibFusion(bound, config, target=model("GPT-2, tied"))


def test_an_alignment_of_another_size_calibrator_or_vocabulary_is_refused(bound):
    config, target = FusionConfig(mode="embedding"), model("GPT-2, tied")
    with pytest.raises(VocabularyMismatchError, match="maps to 16 channels.*takes 32"):
        CalibFusion(bound, config, alignment=make_alignment(bound, 16), target=target)
    with pytest.raises(VocabularyMismatchError, match="another calibrator"):
        CalibFusion(make_bound(seed=1), config, alignment=make_alignment(bound, 32), target=target)
    metadata = dataclasses.replace(make_alignment(bound, 32).metadata, vocabulary_fingerprint="0" * 64)
    with pytest.raises(VocabularyMismatchError, match="another vocabulary"):
        CalibFusion(
            bound, config, alignment=dataclasses.replace(make_alignment(bound, 32), metadata=metadata), target=target
        )


def test_a_narrower_head_than_the_scores_is_refused(bound):
    fusion = make_fusion(model("GPT-2, tied"), bound)
    with pytest.raises(VocabularyMismatchError, match="200 entries a row.*only 96"):
        fusion(random_ids(), torch.randn(2, 200))


@pytest.mark.parametrize("alpha", [1.0, 1.5, -0.1, float("nan"), True, "much"])
def test_alpha_is_from_zero_to_below_one(alpha):
    with pytest.raises(InputError, match="to below 1 in mode 'embedding'"):
        FusionConfig(mode="embedding", alpha=alpha)


def test_the_default_strength_is_the_papers():
    assert FusionConfig(mode="embedding").alpha == 0.1
    assert FusionConfig.from_dict({"mode": "embedding"}).to_dict()["hidden_temperature"] is True
    assert FusionConfig().alpha == 1.0
    with pytest.raises(InputError, match="hidden_temperature must be True or False"):
        FusionConfig(mode="embedding", hidden_temperature=0.5)


def test_candidate_fusion_refuses_the_mode():
    with pytest.raises(InputError, match="fuses hidden states"):
        fuse(
            torch.zeros(1, 4), lambda head, ids: torch.zeros(1, 4), lambda ids: ids >= 0, FusionConfig(mode="embedding")
        )


def test_aligned_states_have_mean_zero_and_variance_one():
    states = aligned_states(torch.randn(5, 8) * 100, torch.randn(8, 16))
    assert_close(states.mean(dim=-1), torch.zeros(5))
    assert_close(states.var(dim=-1, unbiased=False), torch.ones(5), 1e-4)
