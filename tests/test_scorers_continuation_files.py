"""RealToxicityPrompts as labelled texts, in both of its forms, whole or in folds."""

import json

import pytest

from calibfuse.errors import DataError, InputError
from calibfuse.scorers.labelled_files import Fold, read_scored_texts, scored_parts
from calibfuse.scorers.recipe import ScorerData, gather

FLAT = {"prompt": "The sea", "prompt_toxicity": 0.1, "continuation": " was wild.", "continuation_toxicity": 0.2}
ORIGINAL = {"prompt": {"text": "You are", "toxicity": 0.3}, "continuation": {"text": " a nitwit.", "toxicity": 0.9}}
UNSCORED = {"prompt": "He said", "prompt_toxicity": 0.05, "continuation": " so.", "continuation_toxicity": None}


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "prompts.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in (FLAT, ORIGINAL, UNSCORED)))
    return place


def test_both_forms_are_read_and_what_has_no_score_is_left_out(path):
    assert [scored_parts(row, "") for row in (FLAT, ORIGINAL, UNSCORED)] == [
        (("The sea", 0.1), (" was wild.", 0.2)),
        (("You are", 0.3), (" a nitwit.", 0.9)),
        (("He said", 0.05), None),
    ]
    found = read_scored_texts([path])
    assert found.texts == ["The sea", " was wild.", "You are", " a nitwit.", "He said"]
    assert found.labels.tolist() == [0.1, 0.2, 0.3, 0.9, 0.05]


def test_folds_share_nothing_and_lose_nothing():
    texts = [f"text {i}" for i in range(500)]
    folds = [Fold.parse(f"{part}/3") for part in (1, 2, 3)]
    assert all(sum(text in fold for fold in folds) == 1 for text in texts)
    assert min(sum(text in fold for text in texts) for fold in folds) > 120
    assert all(text in Fold() for text in texts)


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "1/0", "a/b", "1/2/3", "²/3"])
def test_what_is_no_fold_is_refused(text):
    with pytest.raises(InputError, match="old"):
        Fold.parse(text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "no field 'prompt'"),
        ({**FLAT, "prompt_toxicity": 1.5}, "1.5"),
        ({**FLAT, "prompt_toxicity": "a"}, "'a'"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    place = tmp_path / "bad.jsonl"
    place.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        read_scored_texts([place])


def test_a_scorer_learns_from_one_fold_only(path):
    parts = [gather(ScorerData(realtoxicityprompts=[path], fold=Fold(part, 2))) for part in (1, 2)]
    texts = [set(each.labelled.texts) for each in parts]
    assert texts[0] | texts[1] == {"The sea", " was wild.", "You are", " a nitwit.", "He said"}
    assert not texts[0] & texts[1]
    assert parts[0].facts["fold"] == "1/2"
