"""Readers of training text, the passage store, and sorting by a scorer."""

import errno
import gzip
import json
import lzma
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibfuse.errors import CheckpointError, DataError, InputError, ScorerError
from calibfuse.textfiles import iter_documents, split_passages
from calibfuse.training import data as data_module
from calibfuse.training.config import TrainingText
from calibfuse.training.data import PassageStore, choose_validation
from tests.sorted_store import WordScorer


def read(*paths: object, **options: object) -> list[str]:
    return list(iter_documents([str(path) for path in paths], **options))


def write(path: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, lambda raw: raw)(data)
    path.write_bytes(packed)
    return path


# ---- readers: good input


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz", ".TXT"])
def test_text_file_gives_one_document_per_block(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", "One line\nand another.\n\n  \nSecond – block.\r\n\r\nThird.")
    assert read(path) == ["One line\nand another.", "Second – block.", "Third."]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.xz"])
def test_jsonl_gives_one_document_per_row(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "first"}, {"comment": "second", "id": 3}, {"text": "  "}, {"content": "a\r\nb"}]
    path = write(tmp_path / f"a{suffix}", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert read(path) == ["first", "second", "a\nb"]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".csv.xz"])
def test_csv_gives_the_text_column(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", 'id,text\n1,"one, with comma"\n\n2,"two\nlines"\n')
    assert read(path) == ["one, with comma", "two\nlines"]


def test_text_field_is_taken_by_name(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", '{"text": "no", "body": "yes"}\n')
    table = write(tmp_path / "b.csv", "text,body\nno,yes\n")
    assert read(rows, table, text_field="body") == ["yes", "yes"]


def test_folder_gives_its_files_sorted_and_skips_the_others(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl.xz", '{"text": "first"}')
    write(tmp_path / "inner" / "c.csv", "text\nthird")
    write(tmp_path / "notes.md", "not read")
    assert read(tmp_path) == ["first", "second", "third"]


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x y"}')) == ["x y"]


def test_half_an_emoji_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (text,) = read(write(tmp_path / "a.jsonl", '{"text": "ha \\ud83d ha"}'))
    assert set(text) == set("ha \ufffd")
    text.encode()


@pytest.mark.parametrize("ending", ["", "\n"])
def test_one_huge_line_is_cut_and_nothing_is_lost(tmp_path: Path, ending: str) -> None:
    words = " ".join(f"wörd{index}" for index in range(40_000))
    documents = read(write(tmp_path / "a.txt", words + ending), max_bytes=10_000)
    assert max(len(document.encode()) for document in documents) <= 10_000
    assert "".join(documents).replace(" ", "") == words.replace(" ", "")


def test_a_file_of_one_huge_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(80):
            file.write("some words without any end " * 4_000)
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    total = sum(len(document) for document in iter_documents([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 8_000_000
    assert peak < 1_500_000


def test_reading_starts_before_the_file_is_whole(tmp_path: Path) -> None:
    """The first documents come although the file's end is not UTF-8: nothing reads ahead."""
    path = write(tmp_path / "a.txt", b"good block\n\n" * 50_000 + b"\xff\xfe\xff")
    documents = iter_documents([path])
    assert [next(documents) for _ in range(3)] == ["good block"] * 3
    with pytest.raises(DataError, match="line 100001"):
        list(documents)


# ---- readers: bad input, one sentence each

BAD_FILES = {
    "unknown extension": ("a.pdf", "text", r"Unknown file extension of .*a\.pdf; expected \.txt, \.jsonl, \.csv"),
    "only a compression": ("a.gz", "text", "Unknown file extension"),
    "empty": ("a.txt", "", r"a\.txt is empty"),
    "empty compressed": ("a.jsonl.gz", "", r"a\.jsonl\.gz is empty"),
    "binary": ("a.txt", b"\x89PNG\r\n\x00\x00\x01", r"a\.txt is a binary file \(a zero byte at byte 6\)"),
    "zero byte later": ("a.txt", b"x" * 9000 + b"\n\n" + b"ab\x00c", r"line 3: .* zero byte at byte 9004"),
    "utf-16": ("a.txt", "some text".encode("utf-16"), "is UTF-16 text; expected UTF-8"),
    "latin-1": (
        "a.txt",
        b"fine\n\ncaf\xe9 au lait\n",
        r"a\.txt, line 3: expected UTF-8 text, got the byte 0xe9 at byte 9",
    ),
    "cut inside a character": ("a.txt", "fine\nend ä".encode()[:-1], r"line 2: .* 0xc3 at byte 9"),
    "latin-1 jsonl": ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', r"a\.jsonl, line 2: expected UTF-8"),
    "blank lines only": ("a.txt", "\n  \n\t\n", r"a\.txt holds no usable line"),
    "empty rows only": ("a.jsonl", '{"text": ""}\n', r"a\.jsonl holds no usable line"),
    "header only": ("a.csv", "text\n", r"a\.csv holds no usable line"),
    "invalid json": ("a.jsonl", '{"text": "ok"}\n{"text": \n', r"a\.jsonl, line 2: .* invalid JSON"),
    "deep json": ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1: .* invalid JSON"),
    "json that is no object": ("a.jsonl", '["text"]\n', r"a\.jsonl, line 1: expected a JSON object .*, got list"),
    "no text field": ("a.jsonl", '{"body": "x"}\n', r"line 1: expected a text field .*, got the fields 'body'"),
    "text is no string": ("a.jsonl", '{"text": 3}\n', r"line 1: expected a string in the field 'text', got int"),
    "csv without text column": ("a.csv", "id,body\n1,x\n", r"a\.csv, line 2: expected a text field .* 'id', 'body'"),
    "short csv row": ("a.csv", "id,text\n1,x\n2\n", r"a\.csv, line 3: expected the header's 2 columns, got 1"),
    "unclosed quote": ("a.csv", 'text\n"open\n' + "word " * 40_000, r"a\.csv, line \d+: not a valid \.csv row"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_gives_one_sentence(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "kind"), [("a.txt.gz", ".gz"), ("a.txt.xz", ".xz")])
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_damaged_compression_gives_one_sentence(tmp_path: Path, name: str, kind: str, damage: str) -> None:
    path = write(tmp_path / name, "".join(f"line {index}\n" for index in range(20_000)))
    path.write_bytes(path.read_bytes()[:-2000] if damage == "truncated" else b"plain text")
    with pytest.raises(DataError, match=rf"is damaged or not a {kind} file"):
        read(path)


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or folder: .*nowhere\.txt"):
        read(tmp_path / "nowhere.txt")


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "x")
    with pytest.raises(DataError, match="holds no text file"):
        read(tmp_path)


def test_row_of_endless_length_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibfuse.textfiles.MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 2000}))
    with pytest.raises(DataError, match="line 1: expected at most 1,000 bytes a line, got more"):
        read(path)


# ---- passages


@given(st.text(max_size=400), st.integers(4, 60))
@settings(deadline=None, max_examples=150)
def test_passages_joined_are_the_document(document: str, max_bytes: int) -> None:
    passages = list(split_passages(document, max_bytes))
    assert "".join(passages) == document
    assert all(0 < len(passage.encode()) <= max_bytes for passage in passages)


def test_passages_end_at_the_best_boundary() -> None:
    first, second, third = "A long first paragraph here.", "\n\nThe second has a sentence.", " And one more.\nThird."
    assert list(split_passages(first + second + third, 40)) == [first, second, third]
    assert list(split_passages("many words without an end", 12)) == ["many words", " without an", " end"]
    assert list(split_passages("ääääää", 5)) == ["ää"] * 3


def test_too_small_a_passage_is_refused() -> None:
    with pytest.raises(DataError, match="at least 4"):
        list(split_passages("text", 3))


# ---- store


@pytest.fixture
def text(tmp_path: Path, sample_lines: list[str]) -> TrainingText:
    clean = [{"text": line} for line in sample_lines]
    mixed = [{"text": f"Number {index}: a bad day, {line}"} for index, line in enumerate(sample_lines)]
    for name, rows in (("clean", clean), ("mixed", mixed)):
        write(tmp_path / f"{name}.jsonl.xz", "\n".join(map(json.dumps, rows)))
    return TrainingText(wanted=[str(tmp_path / "clean.jsonl.xz")], unwanted=[str(tmp_path / "mixed.jsonl.xz")])


def build(text: TrainingText, folder: Path) -> PassageStore:
    return PassageStore.build(text, folder, show_progress=False)


def unsorted(text: TrainingText, scorer: WordScorer) -> TrainingText:
    return TrainingText(unfiltered=[path for path, _ in text.sources], scorer=scorer)


def test_store_holds_every_passage_with_its_label(
    tmp_path: Path, text: TrainingText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calibfuse.training.data.PASSAGE_BYTES", 40)
    store = build(text, tmp_path / "cache")
    expected = [
        (passage.strip(), int(is_wanted))
        for path, is_wanted in text.sources
        for document in iter_documents([path])
        for passage in split_passages(document, 40)
        if len(passage.strip().encode()) >= 16
    ]
    assert [(store.text(index), store.labels[index]) for index in range(len(store))] == expected
    assert store.total_bytes == sum(len(passage.encode()) for passage, _ in expected)
    assert store.texts([3, 0]) == [expected[3][0], expected[0][0]]
    indices = np.array([5, 1])
    assert store.byte_lengths(indices).tolist() == [len(expected[index][0].encode()) for index in indices]


def test_store_splits_every_passage_to_one_side(tmp_path: Path, text: TrainingText) -> None:
    store = build(text, tmp_path)
    sides = np.concatenate([store.train_indices, store.validation_indices])
    assert sorted(sides.tolist()) == list(range(len(store)))
    assert 0 < len(store.validation_indices) < len(store) // 10
    training = set(store.texts(store.train_indices))
    assert not training & set(store.texts(store.validation_indices))


def test_permutation_is_a_function_of_seed_and_epoch(tmp_path: Path, text: TrainingText) -> None:
    store = build(text, tmp_path)
    first = store.permutation(0, seed=1)
    assert first.tolist() == build(text, tmp_path).permutation(0, seed=1).tolist()
    assert first.tolist() != store.permutation(1, seed=1).tolist()
    assert first.tolist() != store.permutation(0, seed=2).tolist()
    assert sorted(first.tolist()) == store.train_indices.tolist()
    clean = store.permutation(0, seed=1, label=1)
    assert set(store.labels[clean].tolist()) == {1}
    assert len(clean) == int((store.labels[store.train_indices] == 1).sum())


def test_sample_stays_within_its_budget_and_off_the_validation_text(tmp_path: Path, text: TrainingText) -> None:
    store = build(text, tmp_path)
    sample = list(store.sample_texts(2000, seed=0))
    assert 2000 <= sum(len(passage.encode()) for passage in sample) < 2000 + 600
    assert sample == list(store.sample_texts(2000, seed=0))
    assert len(list(store.sample_texts(10**9, seed=0))) == len(store.train_indices)


def test_store_is_reused_until_source_or_option_changes(
    tmp_path: Path, text: TrainingText, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(text, tmp_path / "cache")
    written = (store.folder / "data.bin").stat().st_mtime_ns
    again = build(text, tmp_path / "cache")
    assert again.folder == store.folder
    assert (again.folder / "data.bin").stat().st_mtime_ns == written
    monkeypatch.setattr("calibfuse.training.data.PASSAGE_BYTES", 50)
    assert build(text, tmp_path / "cache").fingerprint != store.fingerprint
    assert (
        build(TrainingText(wanted=text.unwanted, unwanted=text.wanted), tmp_path / "cache").fingerprint
        != store.fingerprint
    )
    write(Path(text.wanted[0]), '{"text": "other text than before, of good length"}')
    assert build(text, tmp_path / "cache").fingerprint != store.fingerprint


def test_store_sorts_unfiltered_text(tmp_path: Path, text: TrainingText) -> None:
    scorer = WordScorer("bad")
    store = build(unsorted(text, scorer), tmp_path)
    assert [bool(label) for label in store.labels] == ["bad" not in store.text(index) for index in range(len(store))]
    assert 0 < int(store.labels.sum()) < len(store)
    assert sum(scorer.batches) == len(store)
    assert max(scorer.batches) <= 8192


def test_failing_scorer_leaves_nothing_behind(tmp_path: Path, text: TrainingText) -> None:
    class Broken(WordScorer):
        def score(self, texts: Sequence[str]) -> np.ndarray:
            raise ScorerError("no model")

    with pytest.raises(ScorerError, match="no model"):
        build(unsorted(text, Broken("bad")), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_full_disk_leaves_nothing_behind(tmp_path: Path, text: TrainingText, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data_module.np, "save", save)
    with pytest.raises(CheckpointError, match="Cannot write the passages to .*: No space left on device"):
        build(text, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_file_leaves_no_store_behind(tmp_path: Path, text: TrainingText) -> None:
    bad = write(tmp_path / "bad.txt", b"\xff\xfa")
    with pytest.raises(DataError, match=r"bad\.txt"):
        build(TrainingText(wanted=text.wanted, unwanted=[*text.unwanted, str(bad)]), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_second_builder_of_the_same_store_gives_way(
    tmp_path: Path, text: TrainingText, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(text, tmp_path / "one")
    write_store = data_module._write_store

    def with_a_rival(*arguments: object) -> None:
        shutil.copytree(first.folder, tmp_path / "two" / first.folder.name)
        write_store(*arguments)

    monkeypatch.setattr(data_module, "_write_store", with_a_rival)
    assert build(text, tmp_path / "two").fingerprint == first.fingerprint
    assert [path.name for path in (tmp_path / "two").iterdir()] == [first.folder.name]


@pytest.mark.parametrize("name", ["meta.json", "offsets.npy", "labels.npy", "is_validation.npy", "data.bin"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_store_gives_one_sentence(tmp_path: Path, text: TrainingText, name: str, damage: str) -> None:
    store = build(text, tmp_path / "cache")
    copy = shutil.copytree(store.folder, tmp_path / "copy")
    if damage == "missing":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes((copy / name).read_bytes()[:20])
    with pytest.raises(DataError, match="[Dd]elete the folder"):
        PassageStore(copy)


def test_store_needs_text(tmp_path: Path) -> None:
    same = write(tmp_path / "same.txt", "the same passage again\n\n" * 5)
    with pytest.raises(DataError, match="two different ones"):
        build(TrainingText(wanted=[str(same)]), tmp_path / "cache")
    one = write(tmp_path / "one.txt", "a single passage of text")
    with pytest.raises(DataError, match=r"gives 1 passage\(s\); at least 2"):
        build(TrainingText(wanted=[str(one)]), tmp_path / "cache")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 500)), min_size=2, max_size=60), st.floats(0.01, 0.5))
@settings(deadline=None)
def test_validation_keeps_equal_passages_together(rows: list[tuple[int, int]], share: float) -> None:
    hashes = np.array([value for value, _ in rows], dtype=np.uint64)
    if len(set(hashes.tolist())) == 1:
        return
    lengths = np.array([length for _, length in rows])
    try:
        chosen = choose_validation(hashes, lengths, share, max_bytes=10_000)
    except DataError:
        return
    assert chosen.any()
    assert not chosen.all()
    assert not set(hashes[chosen].tolist()) & set(hashes[~chosen].tolist())


def test_validation_is_capped() -> None:
    hashes = np.random.default_rng(0).integers(2**63, size=10_000).astype(np.uint64)
    chosen = choose_validation(hashes, np.full(10_000, 100), 0.5, max_bytes=30_000)
    assert chosen.sum() == 300


# ---- sorting


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5, float("nan")])
def test_threshold_out_of_range_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match="threshold"):
        TrainingText(unfiltered=["a.txt"], scorer=WordScorer("bad"), threshold=threshold)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda texts: np.zeros(1), r"returned an array of shape \(1,\)"),
        (lambda texts: np.array([0.1] + [float("nan")] * (len(texts) - 1)), "nan for text 1"),
        (lambda texts: np.full(len(texts), 1.5), "1.5 for"),
    ],
)
def test_scores_that_are_no_probabilities_are_refused(tmp_path: Path, text: TrainingText, score, message) -> None:
    scorer = WordScorer("bad")
    scorer.score = score
    with pytest.raises(ScorerError, match=message):
        build(unsorted(text, scorer), tmp_path)
