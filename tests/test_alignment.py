"""The alignment of mode "embedding": it learns, it is the same for the same seed, and it finds its target again."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from tiny_calibrators import make_bound, make_calibrator

from calibfuse import hub
from calibfuse.cli.main import main
from calibfuse.embedding import training as alignment_training
from calibfuse.embedding.alignment import (
    Alignment,
    alignment_folders,
    common_tokens,
    find_alignment,
    last_states,
    target_embeddings,
)
from calibfuse.embedding.training import source_embeddings, train_alignment
from calibfuse.errors import (
    CheckpointError,
    CheckpointFormatError,
    InputError,
    MissingHeadError,
)
from calibfuse.processor import CalibFusion

VOCAB, HIDDEN = 400, 24
QUICK = {"epochs": 1}


def make_target(seed=0, vocab=VOCAB, hidden=HIDDEN):
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "proj" not in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def bound():
    return make_bound(size=VOCAB)


@pytest.fixture(scope="module")
def target():
    return make_target()


def linear_target(bound):
    """A target whose embeddings are a random linear map of the calibrator's: what an alignment can learn in full."""
    model = make_target(seed=3)
    source = source_embeddings(bound)
    mapping = (
        torch.randn(source.shape[1], HIDDEN, generator=torch.Generator().manual_seed(5)) / source.norm(dim=1).mean()
    )
    target_embeddings(model).copy_(source @ mapping * 4)
    return model


# ---- learning


def test_a_linear_relation_is_learned_and_holds_for_tokens_never_trained_on(bound, monkeypatch):
    monkeypatch.setattr(alignment_training, "BATCH_SIZE", 16)
    monkeypatch.setattr(alignment_training, "HELD_OUT", 0.2)
    target = linear_target(bound)
    alignment = train_alignment(bound, target, epochs=30)
    metadata = alignment.metadata
    assert metadata.common_tokens == VOCAB - 3
    assert metadata.held_out_tokens == math.ceil(0.2 * (VOCAB - 3))
    assert metadata.held_out_loss < 0.6


def test_unrelated_embeddings_are_not_learned(bound, target, monkeypatch):
    monkeypatch.setattr(alignment_training, "HELD_OUT", 0.5)
    metadata = train_alignment(bound, target, epochs=3).metadata
    assert metadata.held_out_loss > math.log(11) - 0.3


def test_the_start_is_near_the_loss_of_guessing(bound, target, monkeypatch):
    monkeypatch.setattr(alignment_training, "LEARNING_RATE", 1e-9)
    alignment = train_alignment(bound, target, epochs=1)
    assert alignment.metadata.held_out_loss == pytest.approx(math.log(11), abs=0.05)


def test_one_step_is_the_loss_written_out(bound, target):
    """Cross-entropy of the own token over the inner products, by hand."""
    rows = target_embeddings(target)
    ids = common_tokens(bound.vocabulary, rows)
    source = source_embeddings(bound)
    pairs = alignment_training._Pairs(source[ids], rows, ids)
    matrix = torch.randn(source.shape[1], HIDDEN, generator=torch.Generator().manual_seed(0))
    positives, others = torch.tensor([4, 9]), torch.tensor([[1, 2, 3], [10, 8, 4]])
    total = 0.0
    for positive, negatives in zip(positives, others, strict=True):
        mapped = source[ids[positive]] @ matrix
        products = [float(mapped @ rows[ids[token]]) for token in (positive, *negatives)]
        total -= products[0] - math.log(sum(math.exp(product) for product in products))
    found = alignment_training._loss(pairs, matrix, positives, others)
    assert float(found) == pytest.approx(total / 2, rel=1e-5)


def test_source_embeddings_are_what_the_body_is_fed():
    bound = make_bound(size=VOCAB, words={})
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    calibrator = bound.calibrator
    vectors = bound.vectors[ids]
    fed = calibrator.embed(vectors, torch.zeros_like(ids, dtype=torch.bool))
    assert torch.allclose(source_embeddings(bound)[ids], fed, atol=1e-5)


def test_the_negatives_are_never_the_token_itself():
    tokens = torch.tensor([5, 7])
    others = alignment_training._other_tokens(tokens.repeat(50), tokens, 3, torch.Generator().manual_seed(0))
    assert torch.equal(others, torch.tensor([7, 5]).repeat(50)[:, None].expand(-1, 3))


def test_held_out_tokens_do_not_touch_the_matrix(bound, monkeypatch):
    """Their target embeddings may be anything: positives and negatives are drawn from the others."""
    first, second = make_target(seed=1), make_target(seed=1)
    order = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(9))
    held = order[: math.ceil(0.3 * (VOCAB - 3))] + 3  # ids 0 to 2 are special
    target_embeddings(second)[held] *= -7.0
    monkeypatch.setattr(alignment_training, "HELD_OUT", 0.3)
    matrices = [train_alignment(bound, each, seed=9, **QUICK).matrix for each in (first, second)]
    assert torch.equal(*matrices)


# ---- determinism


def test_the_seed_decides(bound, target):
    first, again = (train_alignment(bound, target, seed=4, **QUICK) for _ in range(2))
    assert torch.equal(first.matrix, again.matrix)
    assert first.metadata == again.metadata
    other = train_alignment(bound, target, seed=5, **QUICK)
    assert not torch.equal(first.matrix, other.matrix)
    assert first.key == other.key  # same target: the newer one replaces the older


def test_the_global_random_state_is_left_alone(bound, target):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train_alignment(bound, target, **QUICK)
    assert torch.equal(torch.rand(1), expected)


def test_a_head_wider_than_the_tokenizer_and_a_narrower_one(bound):
    assert train_alignment(bound, make_target(vocab=VOCAB + 64), **QUICK).metadata.common_tokens == VOCAB - 3
    assert train_alignment(bound, make_target(vocab=VOCAB - 50), **QUICK).metadata.common_tokens == VOCAB - 53


# ---- options


def test_bad_options_are_refused(bound, target):
    with pytest.raises(InputError, match="epochs must be a positive integer, got 1.5"):
        train_alignment(bound, target, epochs=1.5)


@pytest.mark.parametrize("learning_rate", [100.0, 1e37])
def test_divergence_is_an_error(bound, target, learning_rate, monkeypatch):
    monkeypatch.setattr(alignment_training, "LEARNING_RATE", learning_rate)
    with pytest.raises(InputError, match="diverged"):
        train_alignment(bound, target)


def test_too_few_common_tokens_are_refused(target):
    with pytest.raises(InputError, match="only 7 tokens in common; 20 are needed"):
        train_alignment(make_bound(size=10), target)


def test_quantised_embeddings_are_refused(bound):
    class Quantised(torch.nn.Module):
        weight = torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)

    target = make_target()
    target.set_input_embeddings(Quantised())
    with pytest.raises(InputError, match="input embeddings of LlamaForCausalLM cannot be read .*quantised"):
        train_alignment(bound, target)


# ---- files


@pytest.fixture(scope="module")
def alignment(bound, target):
    return train_alignment(bound, target, **QUICK)


def test_save_and_load_round_trip(alignment, tmp_path):
    folder = alignment.save(tmp_path)
    assert folder == tmp_path / "alignments" / alignment.key
    assert sorted(path.name for path in folder.iterdir()) == ["alignment.json", "alignment.safetensors"]
    loaded = Alignment.load(folder)
    assert torch.equal(loaded.matrix, alignment.matrix)
    assert torch.equal(loaded.sketch, alignment.sketch)
    assert loaded.metadata == alignment.metadata
    assert loaded.key == alignment.key


@pytest.mark.parametrize("cut", [0, 9, 300])
def test_a_truncated_matrix_is_an_error(alignment, tmp_path, cut):
    folder = alignment.save(tmp_path)
    path = folder / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        Alignment.load(folder)


def test_a_flipped_bit_is_an_error(alignment, tmp_path):
    path = alignment.save(tmp_path) / "alignment.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        Alignment.load(path.parent)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format_version": 2}, CheckpointFormatError, "install a newer calibfuse"),
        ({"format": "calibfuse-calibrator"}, CheckpointError, "Expected the configuration of a calibfuse-alignment"),
        ({"width": 7}, CheckpointError, "do not belong together"),
    ],
)
def test_wrong_facts_are_an_error(alignment, tmp_path, change, error, message):
    path = alignment.save(tmp_path) / "alignment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(error, match=message):
        Alignment.load(path.parent)


def test_missing_files_are_an_error(alignment, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        Alignment.load(tmp_path)
    folder = alignment.save(tmp_path)
    (folder / "alignment.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        Alignment.load(folder)


def test_a_folder_that_cannot_be_written_to_is_an_error(alignment, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write"):
        alignment.save(tmp_path / "file")


# ---- finding it again


def test_each_target_finds_its_own(bound, tmp_path):
    """Targets of one shape and tokenizer side by side; also after fine-tuning, and in another dtype."""
    targets = [make_target(seed) for seed in range(3)]
    kept = {}
    for number, each in enumerate(targets):
        kept[number] = train_alignment(bound, each, seed=number, **QUICK)
        kept[number].save(tmp_path)
    for number, each in enumerate(targets):
        embeddings = target_embeddings(each)
        embeddings += 0.02 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
        for form in (each, each.to(torch.bfloat16)):
            found = find_alignment([tmp_path], bound, form, calibrator="C")
            assert torch.equal(found.matrix, kept[number].matrix)


def test_an_alignment_with_the_figures_of_earlier_versions_loads(alignment, tmp_path):
    path = alignment.save(tmp_path) / "alignment.json"
    earlier = {"embeddings": "input", "negatives": 10, "loss_curve": [[1, 2.0]], "retrieval": {"11": 0.5}}
    path.write_text(json.dumps(json.loads(path.read_text()) | earlier))
    assert Alignment.load(path.parent).metadata == alignment.metadata


def test_another_model_of_the_same_shape_gets_none(alignment, bound, tmp_path):
    alignment.save(tmp_path)
    with pytest.raises(MissingHeadError, match="Make it with `calibfuse align-embedding --calibrator C --model"):
        find_alignment([tmp_path], bound, make_target(seed=8), calibrator="C")


def test_an_alignment_of_older_weights_is_not_used(alignment, bound, target, tmp_path):
    metadata = dataclasses.replace(alignment.metadata, calibrator_fingerprint="0" * 64)
    dataclasses.replace(alignment, metadata=metadata).save(tmp_path)
    with pytest.raises(MissingHeadError, match="with the weights that it has now"):
        find_alignment([tmp_path], bound, target, calibrator="C")


def test_the_ones_own_matrix_damaged_is_an_error(alignment, bound, target, tmp_path):
    path = alignment.save(tmp_path) / "alignment.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        find_alignment([tmp_path], bound, target, calibrator="C")


def test_only_the_universal_calibrator_can_be_aligned(target):
    class Other:
        heads = ("calibrator",)

    with pytest.raises(InputError, match="hidden states of its own, got a Other"):
        find_alignment([], Other(), target, calibrator="C")
    with pytest.raises(InputError, match="states of a universal calibrator, got Other"):
        last_states(Other())


def test_a_causal_lm_as_calibrator_is_refused(saved, capsys):
    arguments = ["align-embedding", "--calibrator", str(saved / "target"), "--model", str(saved / "target")]
    assert main(arguments) == 2
    assert "Only the universal calibrator can be aligned" in capsys.readouterr().err
    with pytest.raises(InputError, match="hidden states of its own, got a LockStepLM"):
        CalibFusion.from_pretrained(str(saved / "target"), target=load(saved), mode="embedding")


def test_missing_facts_are_an_error(alignment, tmp_path):
    path = alignment.save(tmp_path) / "alignment.json"
    values = json.loads(path.read_text())
    del values["seed"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="do not belong together .'seed'"):
        Alignment.load(path.parent)


# ---- from the command line to generate()


@pytest.fixture
def saved(tmp_path, byte_level_tokenizer, wrap_tokenizer, monkeypatch):
    """Folders of a random calibrator and of a random target with its tokenizer."""
    monkeypatch.setenv("CALIBFUSE_CACHE", str(tmp_path / "cache"))
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    make_target(vocab=len(tokenizer)).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    make_calibrator().save_pretrained(tmp_path / "calibrator")
    return tmp_path


def load(saved):
    return transformers.AutoModelForCausalLM.from_pretrained(saved / "target")


def test_align_then_generate(saved, capsys):
    calibrator, target = str(saved / "calibrator"), load(saved)
    with pytest.raises(MissingHeadError, match=r"calibfuse align-embedding --calibrator .*calibrator --model .*target"):
        CalibFusion.from_pretrained(calibrator, target=target, mode="embedding")
    assert main(["align-embedding", "--calibrator", calibrator, "--model", str(saved / "target"), "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "aligned with target" in printed
    assert "held-out tokens" in printed
    fusion = CalibFusion.from_pretrained(calibrator, target=target, mode="embedding", alpha=0.4)
    assert fusion.config.alpha == 0.4
    ids = torch.randint(3, 500, (2, 5), generator=torch.Generator().manual_seed(0))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    fused = target.generate(ids, logits_processor=[fusion], **options)
    assert fusion.calls > 0
    assert not torch.equal(fused, target.generate(ids, **options))


def test_align_reports_as_json_and_keeps_its_seed(saved, capsys):
    arguments = [
        "align-embedding",
        "--calibrator",
        str(saved / "calibrator"),
        "--model",
        str(saved / "target"),
        "--json",
    ]
    arguments += ["--epochs", "1", "--seed", "3"]
    records = []
    for _ in range(2):
        assert main(arguments) == 0
        records.append(json.loads(capsys.readouterr().out))
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    assert records[0]["seed"] == 3
    folder = records[0].pop("folder")
    assert json.loads(json.dumps(dataclasses.asdict(Alignment.load(folder).metadata))) == records[0]


def test_where_the_calibrators_folder_is_not_ours_the_cache_is_used(saved, capsys, monkeypatch):
    monkeypatch.setattr("calibfuse.cli.commands.align_embedding.os.access", lambda path, mode: False)
    calibrator = str(saved / "calibrator")
    assert main(["align-embedding", "--calibrator", calibrator, "--model", str(saved / "target"), "--epochs", "1"]) == 0
    assert not (saved / "calibrator" / "alignments").exists()
    assert list((saved / "cache").glob("aligned/*/alignments/*/alignment.json"))
    assert CalibFusion.from_pretrained(calibrator, target=load(saved), mode="embedding").config.mode == "embedding"


def test_align_without_a_vocabulary_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["align"])
    assert "required: --tokenizer" in capsys.readouterr().err


def test_published_calibrators_carry_their_alignments(alignment, tmp_path):
    """What the Hub's client uploads and downloads of a checkpoint includes the subfolders."""
    from huggingface_hub.utils import filter_repo_objects

    alignment.save(tmp_path)
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("alignment.*")]
    assert len(paths) == 2
    assert sorted(filter_repo_objects(paths, allow_patterns=list(hub.ALLOWED_FILES))) == sorted(paths)
    assert alignment_folders(tmp_path, "0" * 64)[0] == tmp_path
