"""The packed corpus: nothing lost, nothing held out is trained on, and perplexity against a plain loop."""

import math

import numpy as np
import pytest
import torch

from calibfuse.errors import DataError, InputError
from calibfuse.finetune.corpus import PackedCorpus, corpus_perplexity, pack_corpus
from calibfuse.training.loop import endless_batches


def test_blocks_in_a_row_are_the_documents_with_their_marks(tokenizer, sample_lines):
    corpus = pack_corpus(sample_lines, tokenizer, block_length=32, held_out_share=0.0)
    ids = [1 for _ in ()]
    for line in sample_lines:
        ids += [0, *tokenizer(line, add_special_tokens=False)["input_ids"], 1]
    assert corpus.train.dtype == torch.int32
    assert corpus.train.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert corpus.documents == len(sample_lines)
    assert len(corpus.held_out) == 0


def test_one_mark_stands_between_documents_where_begin_and_end_are_the_same(tokenizer):
    tokenizer.eos_token = tokenizer.bos_token
    corpus = pack_corpus(["one", "two"], tokenizer, block_length=2, held_out_share=0.0)
    one, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", "two"))
    expected = [0, *one, 0, *two]
    assert corpus.train.flatten().tolist() == expected[: len(expected) // 2 * 2]


def test_held_out_documents_do_not_depend_on_the_filter(tokenizer, sample_lines):
    asked = []

    def keep(texts):
        asked.extend(texts)
        return np.asarray(["e" in text[:20] for text in texts])

    plain = pack_corpus(sample_lines, tokenizer, block_length=16, held_out_share=0.1)
    filtered = pack_corpus(sample_lines, tokenizer, block_length=16, held_out_share=0.1, keep=keep)
    assert torch.equal(plain.held_out, filtered.held_out)
    assert asked == [line for number, line in enumerate(sample_lines) if number % 10 != 9]
    assert filtered.dropped == sum("e" not in text[:20] for text in asked)
    assert 0 < len(filtered.train) < len(plain.train)


def test_packing_reads_documents_once_and_lazily(tokenizer, sample_lines):
    corpus = pack_corpus(iter(sample_lines), tokenizer, block_length=16, held_out_share=0.1)
    again = pack_corpus(sample_lines, tokenizer, block_length=16, held_out_share=0.1)
    assert torch.equal(corpus.train, again.train)
    assert torch.equal(corpus.held_out, again.held_out)


def test_saved_corpus_comes_back(tokenizer, sample_lines, tmp_path):
    corpus = pack_corpus(sample_lines, tokenizer, block_length=16, held_out_share=0.1)
    corpus.save(tmp_path / "corpus.safetensors")
    again = PackedCorpus.load(tmp_path / "corpus.safetensors")
    assert torch.equal(corpus.train, again.train)
    assert torch.equal(corpus.held_out, again.held_out)
    assert (again.documents, again.dropped) == (corpus.documents, corpus.dropped)


def test_each_epoch_reads_every_block_once_in_an_order_of_the_seed():
    def order(seed):
        batches = endless_batches(np.arange(7), 2, lambda epoch: np.random.default_rng([seed, epoch]))
        return [row for _ in range(7) for row in next(batches).tolist()]

    first, second = order(3)[:7], order(3)[7:]
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_perplexity_equals_a_loop_over_tokens(tiny_llama):
    model = tiny_llama(50).train()
    blocks = torch.randint(3, 50, (5, 8), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    nats = []
    with torch.no_grad():
        for row in blocks.long():
            for place in range(1, 8):
                nats.append(-float(model(row[None, :place]).logits[0, -1].log_softmax(-1)[row[place]]))
    assert corpus_perplexity(model, blocks, batch_size=2) == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert model.training, "the mode is put back"
    assert math.isnan(corpus_perplexity(model, blocks[:0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_length": 1}, "at least 2 tokens, got block_length 1"),
        ({"held_out_share": 0.6}, "held_out_share must be in"),
    ],
)
def test_settings_out_of_range_are_refused(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        pack_corpus(["text"], tokenizer, **options)


def test_too_little_text_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(DataError, match="no documents"):
        pack_corpus([], tokenizer)
    with pytest.raises(DataError, match=r"training part of the corpus has \d+ tokens .*fewer than one block of 128"):
        pack_corpus(["a few words"], tokenizer, held_out_share=0.0)
    with pytest.raises(DataError, match="held-out part of the corpus has 0 tokens"):
        pack_corpus(["a few words " * 100], tokenizer, block_length=16)
    with pytest.raises(DataError, match="1 of them filtered out"):
        pack_corpus(["a few words " * 100], tokenizer, keep=lambda texts: np.zeros(len(texts), bool))
