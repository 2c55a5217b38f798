"""Properties of vocabularies over random tokenizers, token tables, texts and damaged files."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary import Vocabulary
from calibfuse.vocabulary.token_table import Hints, TokenTable
from calibfuse.vocabulary.vocabulary import FALLBACK_SHARE

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = st.text(max_size=40)
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<|end|>")  # text that a tokenizer reads as a control token
# Text with many of the marks that spellings use, so that their borders are met often.
MARKS = [
    "▁",
    "Ġ",
    "##",
    "</w>",
    "<0x41>",
    "<0xe2>",
    "<|x|>",
    "[x]",
    "é",
    "国",
    "\udcff",
    "\x00",
    "<",
    "[",
    " ",
    "a",
    "b",
    "🙂",
]
MARKED = st.lists(st.sampled_from(MARKS), max_size=4).map("".join)


def spell(vocabulary: Vocabulary, ids: list[int]) -> bytes:
    return b"".join(map(vocabulary.token_bytes, ids))


# ---- the vectorised path against the obvious one


@st.composite
def token_tables(draw):
    flavour = draw(st.sampled_from(["", "▁", "##", "</w>", "Ġ"]))
    ordinary = MARKED.map(lambda text: text + flavour if flavour == "</w>" else flavour + text)
    token = st.one_of(ordinary, ordinary, MARKED, st.text(max_size=5), st.none(), st.binary(max_size=4))
    tokens = draw(st.lists(token, max_size=30))
    ids = st.frozensets(st.integers(0, max(len(tokens) - 1, 0)), max_size=5)
    hints = st.builds(
        Hints,
        byte_level=st.sampled_from([None, True, False]),
        metaspace=st.sampled_from([None, True, False]),
        continuation_prefix=st.sampled_from([None, "##", "@@"]),
        word_suffix=st.sampled_from([None, "</w>", "_"]),
        whole_words=st.booleans(),
    )
    return TokenTable(tokens, draw(ids), draw(ids), "random", draw(hints))


@FAST
@given(st.lists(st.one_of(st.none(), st.binary(max_size=5)), max_size=20), st.lists(st.binary(min_size=1, max_size=5)))
def test_byte_strings_are_kept_and_extended(tokens, extra):
    assume(sum(bool(token) for token in tokens) >= 2)
    vocabulary = Vocabulary.from_byte_strings(tokens).extended(extra)
    assert [vocabulary.token_bytes(i) for i in range(len(vocabulary))] == [*(token or b"" for token in tokens), *extra]
    assert vocabulary.fingerprint == Vocabulary.from_byte_strings([*tokens, *extra]).fingerprint


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([None, b"a", b"b", b"ab", b"", b"\x00", b"\x00\x00", b"ba"]), max_size=14), st.data())
def test_ids_with_equal_bytes_share_all_of_their_mass(tokens, data):
    assume(sum(bool(token) for token in tokens) >= 2)
    plain = Vocabulary.from_byte_strings(tokens)
    flags = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    vocabulary = dataclasses.replace(plain, is_fallback=np.array(flags, dtype=np.bool_))
    twins: dict[bytes, list[int]] = {}
    for token_id, token in enumerate(tokens):
        if token:
            twins.setdefault(token, []).append(token_id)
    expected = np.zeros(len(tokens))
    for ids in twins.values():
        used = [token_id for token_id in ids if not flags[token_id]]
        for token_id in ids:
            share = 1 / len(ids)
            if used and len(used) < len(ids):
                rest = len(ids) - len(used)
                share = FALLBACK_SHARE / rest if flags[token_id] else (1 - FALLBACK_SHARE) / len(used)
            expected[token_id] = np.log(share)
    np.testing.assert_allclose(vocabulary.log_shares, expected, atol=1e-5)
    assert vocabulary.fingerprint == plain.fingerprint
    order = data.draw(st.permutations(range(len(tokens))))
    permuted = dataclasses.replace(
        Vocabulary.from_byte_strings([tokens[i] for i in order]), is_fallback=np.array([flags[i] for i in order], bool)
    )
    np.testing.assert_allclose(permuted.log_shares, vocabulary.log_shares[list(order)], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(token_tables(), token_tables())
def test_tables_with_the_same_fingerprint_have_the_same_bytes(table, other):
    assert table.fingerprint() == dataclasses.replace(table, name="another").fingerprint()
    if table.fingerprint() is None:
        assert any(isinstance(token, bytes) for token in table.tokens)
        return
    same = (table.tokens, table.special, table.literal, table.hints) == (
        other.tokens,
        other.special,
        other.literal,
        other.hints,
    )
    assert (table.fingerprint() == other.fingerprint()) == same
    longer = dataclasses.replace(table, tokens=[*table.tokens, None])
    assert longer.fingerprint() != table.fingerprint()


# ---- texts on tokenizers of each family


@FAST
@given(TEXT)
def test_byte_level_bytes_give_the_text(byte_level_tokenizer, text):
    vocabulary = Vocabulary.from_tokenizer(byte_level_tokenizer)
    assume(not any(special in text for special in SPECIAL))
    assert spell(vocabulary, byte_level_tokenizer.encode(text).ids) == text.encode()


@FAST
@given(TEXT)
def test_byte_fallback_bytes_give_the_text_after_a_space(byte_fallback_tokenizer, text):
    assume(not any(special in text for special in SPECIAL))
    vocabulary = Vocabulary.from_tokenizer(byte_fallback_tokenizer)
    spelled = spell(vocabulary, byte_fallback_tokenizer.encode(text).ids)
    expected = f" {text}" if text else ""
    assert spelled.decode() == expected.replace("▁", " ")


@FAST
@given(st.text("abcdefghijklmnopqrstuvwxyz ,.", max_size=60))
def test_unigram_bytes_give_the_text_after_a_space(unigram_tokenizer, text):
    vocabulary = Vocabulary.from_tokenizer(unigram_tokenizer)
    ids = unigram_tokenizer.encode(text).ids
    assume(unigram_tokenizer.token_to_id("<unk>") not in ids)
    spelled = spell(vocabulary, ids).decode()
    assert spelled in (text, f" {text}")  # a text that starts with a space gets no further one


@FAST
@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyzAB", min_size=1, max_size=8), max_size=8))
def test_word_piece_bytes_give_the_words_each_after_a_space(wordpiece_tokenizer, words):
    vocabulary = Vocabulary.from_tokenizer(wordpiece_tokenizer)
    ids = wordpiece_tokenizer.encode(" ".join(words)).ids
    assume(wordpiece_tokenizer.token_to_id("[UNK]") not in ids)
    assert spell(vocabulary, ids).decode() == "".join(f" {word.lower()}" for word in words)


@st.composite
def random_byte_level_tokenizers(draw):
    """A byte-level BPE trained on random text, with Llama-like, Qwen-like or GPT-2-like splitting and added tokens."""
    corpus = draw(st.lists(st.text(max_size=60), min_size=1, max_size=8))
    tokenizer = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=draw(st.booleans()))
    splits = {
        "none": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "words": [pre_tokenizers.Split(tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+"), "isolated")],
    }
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*draw(st.sampled_from(list(splits.values()))), byte_level])
    if draw(st.booleans()):
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=draw(st.integers(256, 400)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(draw(st.lists(st.sampled_from(["  ", "    ", "日本", "<tool>", "ab c"]), unique=True)))
    tokenizer.add_special_tokens(draw(st.lists(st.sampled_from(["<|end|>", "<s>"]), unique=True)))
    return tokenizer


@FAST
@given(random_byte_level_tokenizers(), st.lists(st.one_of(TEXT, st.sampled_from(["  ", "日本語", "x ab cd", "\r\n"]))))
def test_random_byte_level_tokenizers_give_the_text(tokenizer, pieces):
    text = "".join(pieces)
    assume(not any(special in text for special in SPECIAL))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert spell(vocabulary, tokenizer.encode(text).ids) == text.encode()
    from_file = Vocabulary.from_tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_str()))
    assert from_file.fingerprint == vocabulary.fingerprint


@FAST
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=40), min_size=1), TEXT)
def test_random_byte_fallback_tokenizers_give_the_text(corpus, text):
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    # without a token of its own the mark of a space would be spelled in bytes, and not come back as a space
    pieces = dict.fromkeys(["▁", *state["vocab"]])
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    assume(len(set(names)) == len(names))
    merges = [tuple(pair) for pair in state["merges"]]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    # a piece of text that looks like a byte token is one, for the tokenizer too
    assume(not any("<0x" in piece for piece in [text, *corpus]))
    assert spell(vocabulary, tokenizer.encode(text).ids).decode() == text.replace("▁", " ")


# ---- permuted ids


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback", "wordpiece", "unigram"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_permuted_ids_permute_the_bytes(family, request, seed):
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    content = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    new_id = np.random.default_rng(seed).permutation(size).tolist()
    vocab = content["model"]["vocab"]
    if isinstance(vocab, list):
        content["model"]["vocab"] = [vocab[old] for old in np.argsort(new_id)]
        content["model"]["unk_id"] = new_id[content["model"]["unk_id"]]
    else:
        content["model"]["vocab"] = {token: new_id[old] for token, old in vocab.items()}
    for entry in content["added_tokens"]:
        entry["id"] = new_id[entry["id"]]
    before = Vocabulary.from_tokenizer(tokenizer)
    after = Vocabulary.from_tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    assert [after.token_bytes(new_id[i]) for i in range(size)] == [before.token_bytes(i) for i in range(size)]
    assert after.is_special[new_id].tolist() == before.is_special.tolist()


# ---- damaged and foreign files


def read_or_refuse(content: bytes, name: str) -> None:
    """Read a file as a tokenizer; any exception but a sentence of ours fails the test."""
    message = ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            Vocabulary.from_tokenizer(path)
        except VocabularyError as error:
            message = str(error)
    assert "\n" not in message


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda tail: b"\x0a\x05\x0a\x03abc" + tail)))
def test_random_files_are_read_or_refused_in_one_sentence(content):
    read_or_refuse(content, "tokenizer.model")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["model", "vocab", "added_tokens", "decoder", "decoders", "type", "id", "content", "unk_id"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
TOKENIZER_JSON = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"vocab": st.one_of(JSON, st.dictionaries(st.text(max_size=3), st.integers(0, 9)))}
        )
    },
    optional={"added_tokens": JSON, "decoder": JSON, "pre_tokenizer": JSON},
)
TEKKEN_JSON = st.fixed_dictionaries(
    {"vocab": st.lists(st.fixed_dictionaries({"token_bytes": JSON, "rank": JSON})), "config": JSON}
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(JSON, TOKENIZER_JSON, TEKKEN_JSON))
def test_random_json_is_read_or_refused_in_one_sentence(content):
    read_or_refuse(json.dumps(content).encode(), "tokenizer.json")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), replacement=st.binary(max_size=3), cut=st.booleans())
def test_damaged_tokenizer_json_is_read_or_refused_in_one_sentence(wordpiece_tokenizer, position, replacement, cut):
    content = wordpiece_tokenizer.to_str().encode()
    at = int(position * len(content))
    read_or_refuse(content[:at] + replacement + (b"" if cut else content[at + len(replacement) :]), "tokenizer.json")
