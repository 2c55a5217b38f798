"""Bytes of token ids: each family by hand-worked examples, every way to name a tokenizer, bad input in one sentence."""

import base64
import json
import struct
import time
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from calibfuse.errors import VocabularyError
from calibfuse.vocabulary import Vocabulary, quick_fingerprint
from calibfuse.vocabulary.byte_strings import BYTE_ALPHABET, encode_tokens, spelling_of
from calibfuse.vocabulary.sentencepiece import BYTE, NORMAL, read_pieces
from calibfuse.vocabulary.token_table import Hints, TokenTable, is_mark
from calibfuse.vocabulary.vocabulary import FALLBACK_SHARE

ALPHABET = {byte: character for character, byte in BYTE_ALPHABET.items()}


def byte_level(text: bytes) -> str:
    """Spell bytes in GPT-2's alphabet."""
    return "".join(ALPHABET[byte] for byte in text)


def table(tokens, special=(), literal=(), hints=None):
    return TokenTable(list(tokens), frozenset(special), frozenset(literal), "a test", hints or Hints())


def all_bytes(tokens, **settings):
    return encode_tokens(table(tokens, **settings))[0]


def byte_level_vocab(*words: bytes) -> dict[str, int]:
    return {token: i for i, token in enumerate([*BYTE_ALPHABET, *map(byte_level, words)])}


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low]) if not rest else bytes([low | 0x80]) + varint(rest)


def sentencepiece_model(pieces) -> bytes:
    """A SentencePiece model by hand: (text, type) pieces, then a field that readers skip."""
    body = b""
    for text, kind in pieces:
        encoded = text.encode()
        piece = b"\x0a" + varint(len(encoded)) + encoded + b"\x15" + struct.pack("<f", -1.5)
        piece += b"" if kind == NORMAL else b"\x18" + bytes([kind])
        body += b"\x0a" + varint(len(piece)) + piece
    trainer = b"\x1a\x03abc"
    return body + b"\x12" + varint(len(trainer)) + trainer


# ---- spellings, worked by hand


def test_byte_level_alphabet_is_the_one_of_the_tokenizers_library():
    assert set(BYTE_ALPHABET) == set(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a b\n", "€", "\x00\x7f\xa0\xad\xff"):
        spelled = "".join(piece for piece, _ in splitter.pre_tokenize_str(text))
        assert bytes(BYTE_ALPHABET[character] for character in spelled) == text.encode()


def test_byte_level_tokens_become_their_bytes():
    tokens = [*BYTE_ALPHABET, "Ġthe", "ĊĊ", byte_level("€".encode()), byte_level(b"\xe2\x82")]
    assert all_bytes(tokens)[256:] == [b" the", b"\n\n", "€".encode(), b"\xe2\x82"]


def test_metaspace_and_byte_fallback_become_spaces_and_bytes():
    tokens = ["▁the", "ing", "<0x0A>", "<0xff>", "▁▁", "é", "<0x1>"]
    assert all_bytes(tokens) == [b" the", b"ing", b"\n", b"\xff", b"  ", "é".encode(), b"<0x1>"]


def test_word_pieces_carry_a_space_only_where_a_word_starts():
    tokens = ["the", "##ing", "##s", ",", "国", "##国", "élan", "##", "…", "$", "[CLS]", "[unused7]", "a]", "7"]
    expected = [b" the", b"ing", b"s", b",", "国".encode(), "国".encode(), " élan".encode(), b"##", "…".encode(), b"$"]
    assert all_bytes(tokens) == [*expected, b"", b"", b" a]", b" 7"]


def test_word_suffix_becomes_a_trailing_space():
    assert all_bytes(["the</w>", "th", "é</w>", "!</w>"]) == [b"the ", b"th", "é ".encode(), b"! "]


def test_byte_level_with_word_suffix_is_recognised():
    tokens = [*BYTE_ALPHABET, *(character + "</w>" for character in BYTE_ALPHABET), "the</w>", "Ã©</w>"]
    assert all_bytes(tokens)[-2:] == [b"the ", "é ".encode()]


def test_one_character_per_byte_is_recognised():
    tokens = ["<pad>", "</s>", *map(chr, range(256))]
    assert all_bytes(tokens, special=(0, 1)) == [b"", b"", *(bytes([byte]) for byte in range(256))]


def test_raw_bytes_stay_as_they_are():
    assert all_bytes([b" the", b"\xff\xfe", b"<0x0A>", "<|endoftext|>"]) == [b" the", b"\xff\xfe", b"<0x0A>", b""]


def test_plain_vocabulary_is_utf_8():
    assert all_bytes(["a", "bc", "日本"]) == [b"a", b"bc", "日本".encode()]


def test_added_tokens_stand_for_their_own_text_in_a_byte_level_vocabulary():
    tokens = [*BYTE_ALPHABET, "  ", "é", "Ġx", "<|im_start|>", "日"]
    decoded = all_bytes(tokens, literal=(256, 257, 258), special=(259,))
    assert decoded[256:] == [b"  ", "é".encode(), "Ġx".encode(), b"", "日".encode()]


def test_a_literal_token_of_a_table_keeps_its_text():
    assert all_bytes(["▁a", "b", "<|x|>"], literal=(2,)) == [b" a", b"b", b"<|x|>"]


def test_escaped_bytes_in_a_token_string_become_bytes_and_other_surrogates_are_refused():
    assert all_bytes(["a", "b\udcff"]) == [b"a", b"b\xff"]
    with pytest.raises(VocabularyError, match="lone surrogate"):
        all_bytes(["a", "b\ud800"])


def test_byte_tokens_and_inner_pieces_of_punctuation_are_fallbacks():
    def fallbacks(tokens, **settings):
        return encode_tokens(table(tokens, **settings))[1].tolist()

    assert fallbacks(["▁a", ",", "<0x2C>", "<0x0A>", "<0x1>"]) == [False, False, True, True, False]
    assert fallbacks(["▁a", "<0x2C>", "<0x41>"], literal=(1,), special=(2,)) == [False, False, False]
    assert fallbacks(["a", ",", "##,", "##s", "国", "##国", "##"]) == [False, False, True, False, False, True, False]
    # where tokens are spelled in another way these are text
    assert fallbacks([*BYTE_ALPHABET, "<0x2C>", "##,"]) == [False] * 258


def test_the_token_that_is_used_gets_the_mass_of_its_bytes():
    vocabulary = Vocabulary.from_table(table(["▁a", ",", "<0x2C>", "<0x0A>"]))
    shares = np.exp(vocabulary.log_shares)
    assert shares.tolist() == pytest.approx([1.0, 1 - FALLBACK_SHARE, FALLBACK_SHARE, 1.0])
    assert vocabulary.extended([b",", b"x"]).log_shares[[1, 2, 4]].tolist() == pytest.approx(
        np.log([(1 - FALLBACK_SHARE) / 2, FALLBACK_SHARE, (1 - FALLBACK_SHARE) / 2]).tolist(), abs=1e-5
    )


def test_a_decoder_decides_where_tokens_leave_doubt():
    tokens = ["a", "b", "ab"]
    assert not spelling_of(table(tokens)).byte_level
    assert spelling_of(table(tokens, hints=Hints(byte_level=True))).byte_level
    assert spelling_of(table(tokens, hints=Hints(metaspace=True))).metaspace
    assert spelling_of(table(tokens, hints=Hints(continuation_prefix="@@"))).continuation_prefix == "@@"
    # a wrong decoder does not outweigh clear tokens
    assert spelling_of(table(["▁a", "▁b"], hints=Hints(byte_level=True))).metaspace


# ---- the class


def test_byte_strings_round_trip_and_extension_keeps_the_ids():
    tokens = [None, b" the", b"", b"\xff\x00", b" the"]
    vocabulary = Vocabulary.from_byte_strings(tokens, name="five")
    assert [vocabulary.token_bytes(i) for i in range(len(vocabulary))] == [token or b"" for token in tokens]
    assert vocabulary.is_special.tolist() == [True, False, True, False, False]
    longer = vocabulary.extended([b"x", b"yz"])
    assert [longer.token_bytes(i) for i in range(7)] == [b"", b" the", b"", b"\xff\x00", b" the", b"x", b"yz"]
    assert longer.data.dtype == np.uint8
    assert longer.offsets.dtype == np.int64
    assert longer.is_special.dtype == np.bool_
    assert vocabulary.extended([]).fingerprint == vocabulary.fingerprint


def test_fingerprint_depends_on_bytes_and_their_borders_but_not_on_the_name():
    one = Vocabulary.from_byte_strings([b"ab", b"c"], name="one")
    assert one.fingerprint == Vocabulary.from_byte_strings([b"ab", b"c"], name="two").fingerprint
    others = [[b"a", b"bc"], [b"ab", b"d"], [b"ab", b"c", None], [b"ab", b"c", b"c"]]
    assert len({one.fingerprint, *(Vocabulary.from_byte_strings(other).fingerprint for other in others)}) == 5


def test_arrays_cannot_be_written():
    vocabulary = Vocabulary.from_byte_strings([b"ab", b"c"])
    with pytest.raises(ValueError, match="read-only"):
        vocabulary.data[0] = 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary.from_byte_strings([]), "at least 2 tokens with text"),
        (lambda: Vocabulary.from_byte_strings([b"a", None]), "has 1 among 2 ids"),
        (lambda: Vocabulary.from_byte_strings(["a", b"b"]), "must be bytes or None, but token 0 is str"),
        (lambda: Vocabulary.from_byte_strings([b"a", b"b"]).token_bytes(2), "id 2 is outside"),
        (lambda: Vocabulary.from_byte_strings([b"a", b"b"]).token_bytes(-1), "id -1 is outside"),
        (lambda: Vocabulary.from_byte_strings([b"a", b"b"]).extended([b"c", b""]), "token 1 is"),
        (lambda: Vocabulary(np.zeros(2, np.uint8), np.array([0, 1]), np.zeros(2, np.bool_), "x"), "Offsets of x"),
        (
            lambda: Vocabulary(np.zeros(2, np.uint8), np.array([0, 2, 2]), np.zeros(2, np.bool_), "x"),
            "exactly the special",
        ),
    ],
)
def test_unusable_byte_strings_are_refused(make, message):
    with pytest.raises(VocabularyError, match=message):
        make()


# ---- tokenizers in memory


def test_fixture_tokenizers_have_the_bytes_that_they_decode_to(any_tokenizer, wrap_tokenizer):
    vocabulary = Vocabulary.from_tokenizer(any_tokenizer)
    assert len(vocabulary) == any_tokenizer.get_vocab_size()
    special = {token.content for token in any_tokenizer.get_added_tokens_decoder().values()}
    assert {any_tokenizer.id_to_token(int(i)) for i in np.flatnonzero(vocabulary.is_special)} == special
    wrapped = Vocabulary.from_tokenizer(wrap_tokenizer(any_tokenizer))
    assert wrapped.fingerprint == vocabulary.fingerprint
    assert Vocabulary.from_tokenizer(vocabulary) is vocabulary


def test_file_and_folder_and_object_agree(any_tokenizer, wrap_tokenizer, tmp_path):
    wrap_tokenizer(any_tokenizer).save_pretrained(tmp_path)
    expected = Vocabulary.from_tokenizer(any_tokenizer).fingerprint
    for place in (tmp_path, str(tmp_path), tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        assert Vocabulary.from_tokenizer(place).fingerprint == expected


def test_added_tokens_of_a_transformers_tokenizer(byte_level_tokenizer, wrap_tokenizer, tmp_path):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    size = len(tokenizer)
    tokenizer.add_tokens(["   ", "日é"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "[TOOL]"]})
    tokenizer.save_pretrained(tmp_path)
    for given in (tokenizer, tokenizer.backend_tokenizer, tmp_path):
        vocabulary = Vocabulary.from_tokenizer(given)
        assert [vocabulary.token_bytes(size + i) for i in range(4)] == [b"   ", "日é".encode(), b"", b""]


MARKS = (
    "<think> </think> <tool_call> <start_of_image> <fim_prefix> <|fim_middle|> <｜User｜> <｜fim▁hole｜> <|12.54|> "
    "<s> </s> [INST] [/INST] [multimodal] [gMASK] <unused12> |||EMAIL_ADDRESS||| <search>"
).split()
TEXTS = [
    *"<td> </table> <H1> <br/> <0x0A> [1] <3> <> || word don't _ ... [a <b x>".split(),
    "   ",
    "\n\n",
    "\t",
    "<a b>",
]


def test_added_tokens_that_look_like_marks_are_marks_and_others_are_text(
    byte_level_tokenizer, wrap_tokenizer, tmp_path
):
    assert [token for token in MARKS if not is_mark(token)] == []
    assert [token for token in TEXTS if is_mark(token)] == []
    size = byte_level_tokenizer.get_vocab_size()
    library = tokenizers.Tokenizer.from_str(byte_level_tokenizer.to_str())
    library.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in (*MARKS, "  \t", "日é")])
    library.save(str(tmp_path / "tokenizer.json"))
    first = library.token_to_id("<think>")
    assert first >= size - 1
    for given in (library, wrap_tokenizer(library), tmp_path):
        vocabulary = Vocabulary.from_tokenizer(given)
        assert [token for token in MARKS if not vocabulary.is_special[library.token_to_id(token)]] == []
        assert [vocabulary.token_bytes(library.token_to_id(token)) for token in ("  \t", "日é")] == [
            b"  \t",
            "日é".encode(),
        ]


def test_a_mark_that_the_model_has_under_the_same_id_is_a_mark_too():
    vocab = {**byte_level_vocab(b" the"), "<tool_call>": 257, "<td>": 258}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<tool_call>", "<td>"])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert [vocabulary.token_bytes(i) for i in (256, 257, 258)] == [b" the", b"", b"<td>"]


def test_added_token_that_the_model_has_is_spelled_as_the_model_spells_it():
    vocab = byte_level_vocab(b" the", "日".encode())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([byte_level("日".encode()), ALPHABET[0xE9], "é日"])
    expected = {vocab[byte_level("日".encode())]: "日".encode(), vocab[ALPHABET[0xE9]]: b"\xe9", 258: "é日".encode()}
    for given in (tokenizer, tokenizers.Tokenizer.from_str(tokenizer.to_str())):
        vocabulary = Vocabulary.from_tokenizer(given)
        assert {i: vocabulary.token_bytes(i) for i in expected} == expected


def test_an_ordinary_word_lent_as_padding_keeps_its_text(byte_level_tokenizer, wrap_tokenizer):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    tokenizer.pad_token = "!"
    bang = tokenizer.convert_tokens_to_ids("!")
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.token_bytes(bang) == b"!"
    tokenizer.pad_token = tokenizer.eos_token
    assert Vocabulary.from_tokenizer(tokenizer).is_special[tokenizer.eos_token_id]


def test_split_before_byte_level_as_in_qwen_is_recognised(sample_lines):
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_level_vocab(b" t", b" th"), [("Ġ", "t"), ("Ġt", "h")]))
    pattern = tokenizers.Regex(r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([tokenizers.AddedToken("<|im_start|>", special=True), tokenizers.AddedToken("tool.")])
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert vocabulary.token_bytes(257) == b" th"
    assert vocabulary.token_bytes(tokenizer.token_to_id("tool.")) == b"tool."
    text = "\n".join(sample_lines) + " 12 🙂"
    assert (
        b"".join(map(vocabulary.token_bytes, tokenizer.encode(text).ids)) == unicodedata.normalize("NFC", text).encode()
    )


def test_unigram_unknown_token_is_special_without_being_added():
    tokenizer = tokenizers.Tokenizer(models.Unigram([("▁a", -1.0), ("<unk>", -2.0), ("b", -3.0)], unk_id=1))
    assert Vocabulary.from_tokenizer(tokenizer).is_special.tolist() == [False, True, False]


def test_word_level_words_carry_a_space():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, ",": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert [vocabulary.token_bytes(i) for i in range(3)] == [b"", b" the", b","]


def test_a_python_part_in_the_tokenizer_does_not_hide_its_vocabulary():
    class Doubling:
        def decode(self, tokens):
            return "".join(tokens)

    tokenizer = tokenizers.Tokenizer(models.BPE(byte_level_vocab(b" the"), []))
    tokenizer.decoder = decoders.Decoder.custom(Doubling())
    assert Vocabulary.from_tokenizer(tokenizer).token_bytes(256) == b" the"


def test_holes_in_the_id_range_are_special():
    tokenizer = tokenizers.Tokenizer(models.BPE({"▁a": 0, "b": 2, "c": 7}, []))
    tokenizer.decoder = decoders.Metaspace()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert [vocabulary.token_bytes(i) for i in range(8)] == [b" a", b"", b"b", b"", b"", b"", b"", b"c"]
    assert vocabulary.is_special.tolist() == [False, True, False, True, True, True, True, False]


def test_added_tokens_among_holes_are_found(tmp_path):
    """The library numbers added tokens itself, from the model's size on: into a hole here. Files say their own ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE({"▁a": 0, "b": 1, "c": 5}, []))
    tokenizer.add_tokens(["two"])
    assert tokenizer.token_to_id("two") == 3
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert [vocabulary.token_bytes(i) for i in range(len(vocabulary))] == [b" a", b"b", b"", b"two", b"", b"c"]
    content = {"model": {"vocab": {"▁a": 0, "b": 1, "c": 5}}, "added_tokens": [{"id": 8, "content": "two"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    vocabulary = Vocabulary.from_tokenizer(tmp_path)
    assert [vocabulary.token_bytes(i) for i in (0, 1, 5, 8)] == [b" a", b"b", b"c", b"two"]
    assert vocabulary.is_special.sum() == 5


def test_ids_with_equal_bytes_are_all_kept():
    pieces = [("▁a", -1.0), ("b", -1.0), ("▁a", -2.0), ("<unk>", 0.0)]
    vocabulary = Vocabulary.from_tokenizer(tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3)))
    assert [vocabulary.token_bytes(i) for i in range(4)] == [b" a", b"b", b" a", b""]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.add_tokens(["x y"])
    at = tokenizer.token_to_id("x y")
    assert Vocabulary.from_tokenizer(tokenizer).token_bytes(at) == b"x y"
    byte_and_letter = Vocabulary.from_byte_strings([b"a", b"a", b"b"])
    assert byte_and_letter.token_bytes(0) == byte_and_letter.token_bytes(1)


class SlowTokenizer:
    """What a slow transformers tokenizer shows of itself."""

    name_or_path = "slow"
    pad_token_id = None

    def __init__(self, vocab, by_id=None, special_ids=(), added=None):
        self.vocab, self.by_id, self.all_special_ids = vocab, by_id or {}, list(special_ids)
        self.added_tokens_decoder = added or {}

    def get_vocab(self):
        if isinstance(self.vocab, Exception):
            raise self.vocab
        return self.vocab

    def convert_ids_to_tokens(self, ids):
        return [self.by_id.get(i, "<unk>") for i in ids]


def test_slow_tokenizer_with_byte_keys_as_in_tiktoken_based_ones():
    added = {3: tokenizers.AddedToken("<|im_end|>", special=True)}
    slow = SlowTokenizer({b" the": 0, b"\xff": 1, b"a": 2, "<|im_end|>": 3}, special_ids=[3], added=added)
    vocabulary = Vocabulary.from_tokenizer(slow)
    assert [vocabulary.token_bytes(i) for i in range(4)] == [b" the", b"\xff", b"a", b""]


def test_slow_tokenizer_with_equal_strings_and_holes():
    slow = SlowTokenizer({"<unk>": 0, "▁a": 1, "b": 5}, by_id={3: "▁a"}, special_ids=[0])
    vocabulary = Vocabulary.from_tokenizer(slow)
    assert [vocabulary.token_bytes(i) for i in range(6)] == [b"", b" a", b"", b" a", b"", b"b"]


def test_python_written_transformers_tokenizer():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=4)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    text = "Ünicode, 日本 🙂\x00\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(vocabulary.token_bytes, ids)) == text.encode()
    assert vocabulary.is_special.sum() == 3 + 4


@pytest.mark.parametrize("thing", [None, 7, object(), {"a": 0}, ["a"], b"gpt2", len])
def test_what_is_no_tokenizer_is_refused_with_its_type(thing):
    with pytest.raises(VocabularyError, match=f"Expected .* got {type(thing).__name__}"):
        Vocabulary.from_tokenizer(thing)


def test_a_tokenizer_that_cannot_list_its_vocabulary_is_refused():
    with pytest.raises(VocabularyError, match="slow cannot list its vocabulary .*not today"):
        Vocabulary.from_tokenizer(SlowTokenizer(NotImplementedError("not today")))


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"a": 0, "b": -1}, "integers from 0 to .* gives -1 to 'b'"),
        ({"a": 0, "b": 4_000_000_000}, "gives 4000000000 to 'b'"),
        ({"a": 0, "b": 1.0}, "gives 1.0 to 'b'"),
        ({"a": 0, 5: 1}, "must be strings or bytes, but slow has 5"),
        ({"a": 0, "b\ud900": 1, "c": 2}, "lone surrogate"),
        ({"": 0, "a": 1}, "has 1 among 2 ids"),
    ],
)
def test_adversarial_vocabularies_are_refused_in_one_sentence(vocab, message):
    with pytest.raises(VocabularyError, match=message) as caught:
        Vocabulary.from_tokenizer(SlowTokenizer(vocab))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_empty_token_strings_are_special():
    vocabulary = Vocabulary.from_tokenizer(SlowTokenizer({"": 0, "▁a": 1, "b": 2}))
    assert vocabulary.is_special.tolist() == [True, False, False]


def test_all_special_vocabulary_is_refused():
    added = {i: tokenizers.AddedToken(f"<{i}>", special=True) for i in range(5)}
    with pytest.raises(VocabularyError, match="has 0 among 5 ids"):
        Vocabulary.from_tokenizer(SlowTokenizer({f"<{i}>": i for i in range(5)}, added=added))
    empty = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(VocabularyError, match="has 0 among 0 ids"):
        Vocabulary.from_tokenizer(empty)


def test_single_byte_tokens_only():
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_level_vocab(), []))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert sorted(vocabulary.token_bytes(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]


@pytest.mark.slow
def test_three_hundred_thousand_tokens_take_well_under_a_second():
    """Processor time, so that a busy machine does not matter; about 0.25 s on one core."""
    vocab = byte_level_vocab(*(b" %x" % (i * 2654435761) for i in range(300_000 - 256)))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    start = time.process_time()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert time.process_time() - start < 1.5
    assert len(vocabulary) == 300_000
    assert vocabulary.token_bytes(299_999) == b" %x" % ((300_000 - 257) * 2654435761)


# ---- files


def test_sentencepiece_model_by_hand(tmp_path):
    pieces = [("<unk>", 2), ("<s>", 3), ("<0x0A>", 6), ("▁the", 1), ("é", 1), ("▁▁x", 4), ("<|u|>", 4), ("old", 5)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces))
    vocabulary = Vocabulary.from_tokenizer(path)
    expected = [b"", b"", b"\n", b" the", "é".encode(), b"  x", b"", b""]
    assert [vocabulary.token_bytes(i) for i in range(8)] == expected
    assert Vocabulary.from_tokenizer(tmp_path).fingerprint == vocabulary.fingerprint


def test_sentencepiece_model_of_the_library_reads_as_the_library_says(tmp_path, sample_lines):
    library = pytest.importorskip("sentencepiece")
    prefix = tmp_path / "tokenizer"
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_lines),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        user_defined_symbols=["@tool"],
        minloglevel=2,
    )
    processor = library.SentencePieceProcessor(model_file=f"{prefix}.model")
    pieces = read_pieces(prefix.with_suffix(".model").read_bytes())
    assert [text for text, _ in pieces] == [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert [kind == BYTE for _, kind in pieces] == [processor.is_byte(i) for i in range(len(pieces))]
    vocabulary = Vocabulary.from_tokenizer(prefix.with_suffix(".model"))
    for line in [*sample_lines, "日本 🙂 @tool x"]:
        ids = processor.encode(line)
        assert b"".join(map(vocabulary.token_bytes, ids)).decode() == " " + line


@pytest.mark.parametrize(
    "damaged",
    [
        b"\x0a",
        b"\x0a\x7f\x0a",
        b"\x12\x01a",
        b"\x0a\x02\x0b\x00",
        b"\x0a\x04\x0a\x02\xff\xfe",
        b"\x0a\x02\x18\x63",
        b"\x08\xff",
    ],
)
def test_damaged_sentencepiece_messages_are_refused(damaged):
    with pytest.raises(ValueError):  # noqa: PT011
        read_pieces(damaged)


def test_tiktoken_file(tmp_path):
    tokens = [b"!", b" the", b"\xff", b"a"]
    path = tmp_path / "cl.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
    vocabulary = Vocabulary.from_tokenizer(path)
    assert [vocabulary.token_bytes(i) for i in range(4)] == tokens
    config = {"added_tokens_decoder": {"4": {"content": "<|end|>", "special": True}, "6": {"content": "tool"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    beside = Vocabulary.from_tokenizer(tmp_path)
    assert [beside.token_bytes(i) for i in range(7)] == [*tokens, b"", b"", b"tool"]
    path.write_bytes(path.read_bytes() + b"not a rank\n")
    with pytest.raises(VocabularyError, match=r"Line 5 of .*cl.tiktoken is no base64 token and its rank"):
        Vocabulary.from_tokenizer(path)


def test_word_piece_list_keeps_odd_line_separators_as_tokens(tmp_path):
    lines = ["[PAD]", "[UNK]", "the", "##ing", "\u2028", "##\x85", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    expected = [b"", b"", b" the", b"ing", " \u2028".encode(), "\x85".encode(), b","]
    for place in (tmp_path, tmp_path / "vocab.txt"):
        vocabulary = Vocabulary.from_tokenizer(place)
        assert [vocabulary.token_bytes(i) for i in range(len(vocabulary))] == expected


def test_vocab_json_with_the_files_beside_it(tmp_path):
    vocab = byte_level_vocab(b" the")
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "<s>": 257}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 258, "é": 259}))
    special = {"bos_token": {"content": "<s>"}, "additional_special_tokens": ["<|im_start|>"], "pad_token": "!"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    vocabulary = Vocabulary.from_tokenizer(tmp_path)
    assert [vocabulary.token_bytes(i) for i in range(256, 260)] == [b" the", b"", b"", "é".encode()]
    assert vocabulary.token_bytes(vocab["!"]) == b"!"


def test_control_tokens_named_beside_a_tokenizer_json(byte_level_tokenizer, tmp_path):
    byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "Ġthe", "pad_token": "!"}))
    vocabulary = Vocabulary.from_tokenizer(tmp_path)
    assert vocabulary.is_special[byte_level_tokenizer.token_to_id("Ġthe")]
    assert not vocabulary.is_special[byte_level_tokenizer.token_to_id("!")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "is empty"),
        ("tokenizer.json", b" \n ", "is empty"),
        ("tokenizer.json", b"{", "no valid JSON"),
        ("tokenizer.json", b'{"a": "\xff"}', "no valid JSON"),
        ("tokenizer.json", b"{}", "is no tokenizer"),
        ("tokenizer.json", b'{"model_type": "gpt2", "n_layer": 2}', "is no tokenizer"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b", "c": 1}}}', "gives 'b' to 'a'"),
        ("tokenizer.json", b'{"model": {"vocab": [1, 2]}}', "is damaged"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2}]}', "is damaged"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 1}}, "decoder": {"decoders": 5}}', "is damaged"),
        ("tokenizer.json", b'{"model": {"vocab": [["a", 0], ["b", 0]], "unk_id": "x"}}', "gives 'x'"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "b": 9999999999}}}', "gives 9999999999 to 'b'"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "\\ud800": 1}}}', "lone surrogate"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}}', "has 1 among 1 ids"),
        ("tokenizer.json", b"[" * 100_000, "is no tokenizer"),
        ("tokenizer.json", b'{"a":' * 100_000, "no valid JSON"),
        ("tokenizer.model", b"\x0a\xff\xff\xff", "damaged SentencePiece model or no tokenizer"),
        ("model.safetensors", b"\x00\x01\x02\x03" * 50, "is no tokenizer file"),
        ("tok.bin", b"\x07\x00\x00\x00" + b"\xff" * 12, "is no tokenizer file"),
        ("readme.txt", b"Just some text.\nOf two lines.\n", "is no tokenizer file"),
        ("x.tiktoken", b"YQ== 0\nYg==\n", "Line 2"),
    ],
)
def test_bad_files_give_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=message) as caught:
        Vocabulary.from_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_paths_give_one_sentence(tmp_path):
    for place in (
        tmp_path / "nowhere",
        str(tmp_path / "nowhere"),
        "./nowhere",
        "nowhere.json",
        "a/b/c",
        "",
        "a\0b",
        "~nobody/x",
    ):
        with pytest.raises(VocabularyError, match="No tokenizer at|Expected the path") as caught:
            Vocabulary.from_tokenizer(place)
        assert "\n" not in str(caught.value)


def test_folder_without_tokenizer_gives_one_sentence(tmp_path):
    with pytest.raises(VocabularyError, match="holds no tokenizer"):
        Vocabulary.from_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(VocabularyError, match="No tokenizer can be loaded from|at least 2 tokens") as caught:
        Vocabulary.from_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_code_of_its_own_is_asked_for_as_an_object(tmp_path):
    folder = tmp_path / ("long-" * 30)
    folder.mkdir()
    auto_map = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto_map}))
    (folder / "tokenization_own.py").write_text("raise SystemExit('never run')")
    with pytest.raises(VocabularyError, match="pass the tokenizer object") as caught:
        Vocabulary.from_tokenizer(folder)
    assert str(caught.value).endswith(".")
    assert "..." not in str(caught.value).replace("(..., trust", "")


def test_device_files_and_huge_files_are_not_read(tmp_path):
    with pytest.raises(VocabularyError, match="is no tokenizer file"):
        Vocabulary.from_tokenizer("/dev/zero")
    huge = tmp_path / "model.safetensors"
    with huge.open("wb") as file:
        file.truncate(500_000_000)  # sparse: takes no room
    with pytest.raises(VocabularyError, match="is no tokenizer file"):
        Vocabulary.from_tokenizer(huge)


# ---- Hub: only the edge to the network is replaced


class Hub:
    """Stands in for `snapshot_download`: gives one folder and notes what was asked for."""

    def __init__(self, folder, reachable=True):
        self.folder, self.reachable, self.asked = folder, reachable, []

    def download(self, repository, *, revision=None, local_files_only=False, allow_patterns=None):
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.asked.append((allow_patterns, revision))
        if not self.reachable:
            raise LocalEntryNotFoundError("offline")
        return str(self.folder)


def test_hub_id_downloads_tokenizer_files_only(byte_level_tokenizer, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
    hub = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    vocabulary = Vocabulary.from_tokenizer("some-org/some-model", revision="v1")
    assert vocabulary.fingerprint == Vocabulary.from_tokenizer(byte_level_tokenizer).fingerprint
    ((patterns, revision),) = hub.asked
    assert revision == "v1"
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    others = ["model.safetensors", "pytorch_model.bin", "config.json", "tokenization.py"]
    assert list(filter_repo_objects([*files, *others], allow_patterns=patterns)) == files


def test_hub_id_falls_back_to_other_tokenizer_files(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model([("<unk>", 2), ("▁a", 1), ("b", 1)]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", Hub(tmp_path).download)
    assert Vocabulary.from_tokenizer("some-org/some-model").token_bytes(1) == b" a"


def test_unreachable_hub_is_asked_once_and_gives_one_sentence(tmp_path, monkeypatch):
    hub = Hub(tmp_path, reachable=False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    with pytest.raises(VocabularyError, match="the Hub was not reached, and its cache has none") as caught:
        Vocabulary.from_tokenizer("some-org/some-model")
    assert "\n" not in str(caught.value)
    assert len(hub.asked) == 1


def test_unknown_repository_gives_one_sentence(monkeypatch):
    def refuse(*_, **__):
        raise OSError("404 Client Error.\n\nRepository Not Found for url")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(VocabularyError, match="neither a file or folder nor readable on the Hub") as caught:
        Vocabulary.from_tokenizer("some-org/some-model")
    assert "\n" not in str(caught.value)


# ---- quick fingerprints


def test_quick_fingerprint_of_a_path_follows_every_file_that_is_read(byte_level_tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    byte_level_tokenizer.save(str(file))
    keys = [quick_fingerprint(tmp_path), quick_fingerprint(file)]
    assert keys == [quick_fingerprint(str(tmp_path)), quick_fingerprint(str(file))]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    keys.append(quick_fingerprint(tmp_path))
    assert quick_fingerprint(file) == keys[1]  # a file is read without the files beside it
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")
    keys += [quick_fingerprint(tmp_path), quick_fingerprint(file)]
    assert len(set(keys)) == 5
    assert None not in keys


def test_quick_fingerprint_has_no_key_for_what_it_cannot_know(byte_level_tokenizer, tmp_path):
    for thing in (byte_level_tokenizer, tmp_path, "some-org/some-model", None, "a\0b"):
        assert quick_fingerprint(thing) is None


# ---- real tokenizers


REAL = {
    "gpt2.json": (" the", 262, 50257, {50256}),
    "roberta-base.json": (" the", 5, 50265, {0, 1, 2, 3, 50260, 50264}),
    "pythia.json": (" the", 253, 50278, {0, 1, 50277}),
    "phi-2.json": (" the", 262, 50295, {50256}),
    "llama-3.json": (" the", 279, 128000, set()),
    "falcon.json": (" the", 248, 65024, set(range(12))),
    "phi-3-mini.json": (" the", 278, 32011, {0, 1, 2, *range(32000, 32011)}),
    "t5-small.json": (" the", 8, 32100, {0, 1, 2, *range(32000, 32100)}),
    "llama-2.tokenizer.model": (" the", 278, 32000, {0, 1, 2}),
    "mistral-v1.tokenizer.model": (" the", 272, 32000, {0, 1, 2}),
    "bert-base-uncased.vocab.txt": (" the", 1996, 30522, None),
}


def test_added_tokens_of_real_tokenizers_without_the_special_flag(shared_data):
    found = {}
    for name in (name for name in REAL if name.endswith(".json")):
        added = json.loads((shared_data / "tokenizers" / name).read_text(encoding="utf-8"))["added_tokens"]
        unflagged = [token["content"] for token in added if not token["special"]]
        found[name] = [token for token in unflagged if is_mark(token)]
        assert not any(token.strip() for token in set(unflagged) - set(found[name])), "the others are runs of spaces"
    assert {name: marks for name, marks in found.items() if marks} == {"phi-3-mini.json": ["</s>"]}


def some(*names, slow=()):
    """Names to run always, and names for which the slow tests are the place."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


QUICK = ("gpt2.json", "phi-3-mini.json", "t5-small.json", "llama-2.tokenizer.model", "bert-base-uncased.vocab.txt")


@pytest.mark.parametrize("name", some(*QUICK, slow=sorted(REAL.keys() - set(QUICK))))
def test_real_tokenizers_have_the_bytes_of_their_known_tokens(shared_data, name):
    path = shared_data / "tokenizers" / name
    the, the_id, size, special = REAL[name]
    vocabulary = Vocabulary.from_tokenizer(path)
    assert len(vocabulary) == size
    assert vocabulary.token_bytes(the_id) == the.encode()
    if special is not None:
        assert set(np.flatnonzero(vocabulary.is_special).tolist()) == special
    if name.endswith(".json"):
        in_memory = Vocabulary.from_tokenizer(tokenizers.Tokenizer.from_file(str(path)))
        assert in_memory.fingerprint == vocabulary.fingerprint


@pytest.fixture(scope="module")
def real_lines(shared_data):
    """A few hundred real lines, with emoji, newlines, tabs and other scripts; cut to 400 characters."""
    import itertools
    import lzma

    lines = []
    for name, count in (("reddit", 150), ("wikipedia", 80), ("conversation", 100)):
        with lzma.open(shared_data / "text" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as file:
            lines += [json.loads(line)["text"][:400] for line in itertools.islice(file, count)]
    return [
        *lines,
        "🙂🙃 ok\n\n\n  two\tspaces  ",
        " leading",
        "日本語と한국어 и русский",
        "a\r\nb\u00a0c",
        "naïve café 12,345.67",
    ]


@pytest.mark.parametrize(
    "name", some("gpt2", "phi-3-mini", "t5-small", slow=("roberta-base", "phi-2", "llama-3", "falcon", "pythia"))
)
def test_real_tokenizers_spell_real_text(shared_data, real_lines, name):
    """Token bytes put together give the text: as it is, composed (NFC), after a space, or as T5 normalises it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(shared_data / "tokenizers" / f"{name}.json"))
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    unknown = tokenizer.token_to_id("<unk>")
    compared = 0
    for line in real_lines:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        spelled = b"".join(map(vocabulary.token_bytes, ids)).decode()
        if name == "t5-small":
            if unknown in ids:
                continue
            assert spelled.split() == tokenizer.normalizer.normalize_str(line).split()
        else:
            text = unicodedata.normalize("NFC", line) if name == "pythia" else line
            assert spelled == (" " if name == "phi-3-mini" else "") + text
        compared += 1
    assert compared > 250


@pytest.mark.parametrize("name", some("llama-2", slow=("mistral-v1",)))
def test_real_sentencepiece_models_spell_real_text(shared_data, real_lines, name):
    library = pytest.importorskip("sentencepiece")
    path = shared_data / "tokenizers" / f"{name}.tokenizer.model"
    processor = library.SentencePieceProcessor(model_file=str(path))
    vocabulary = Vocabulary.from_tokenizer(path)
    for line in real_lines:
        assert b"".join(map(vocabulary.token_bytes, processor.encode(line))).decode() == " " + line


def test_real_word_pieces_spell_real_text(shared_data, real_lines):
    path = shared_data / "tokenizers" / "bert-base-uncased.vocab.txt"
    vocab = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = Vocabulary.from_tokenizer(path)
    assert Vocabulary.from_tokenizer(tokenizer).fingerprint == vocabulary.fingerprint
    compared = 0
    for line in real_lines:
        ids = tokenizer.encode(line).ids
        if vocab["[UNK]"] not in ids:
            spelled = b"".join(map(vocabulary.token_bytes, ids)).decode()
            words = tokenizer.normalizer.normalize_str(line).split()
            assert spelled.replace(" ", "") == "".join(words)
            compared += 1
    assert compared > 250
    ids = tokenizer.encode("The bakery, on the corner (ok).").ids
    assert b"".join(map(vocabulary.token_bytes, ids)) == b" the bakery, on the corner( ok)."
