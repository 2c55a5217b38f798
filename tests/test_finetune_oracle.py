"""Oracles: scorers and functions as labels in [0, 1]; every way of failing gives one sentence, never a number."""

import math

import numpy as np
import pytest
import torch

from calibfuse.errors import InputError, ScorerError
from calibfuse.scorers import load_scorer
from calibfuse.value.oracle import FunctionOracle, ScorerOracle, load_oracle


def scorer_of(values):
    return load_scorer(lambda texts: values[: len(texts)])


def test_a_scorer_becomes_one_minus_its_toxicity_to_a_power():
    assert ScorerOracle(scorer_of([0.0, 0.5, 1.0])).satisfaction(["a", "b", "c"]).tolist() == [1.0, 0.5, 0.0]
    assert ScorerOracle(scorer_of([0.0, 0.5, 1.0]), power=2).satisfaction(["a", "b", "c"]).tolist() == [1, 0.75, 0]


def test_a_threshold_makes_hard_labels():
    labels = ScorerOracle(scorer_of([0.1, 0.5, 0.9]), threshold=0.5).satisfaction(["a", "b", "c"])
    assert labels.tolist() == [1.0, 0.0, 0.0]


def test_the_name_says_how_labels_are_made():
    scorer = scorer_of([0.0])
    assert ScorerOracle(scorer, power=2).name.endswith("(1 - toxicity^2)")
    assert ScorerOracle(scorer, threshold=0.4).name.endswith("(toxicity < 0.4)")


def test_the_bundled_scorer_is_an_oracle():
    kind, rude = load_oracle("bundled").satisfaction(["Thank you, that was kind.", "You are a fucking idiot."])
    assert kind > 0.8 > 0.3 > rude


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write my_oracle.py with the given code into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(code, name):
        (tmp_path / f"{name}.py").write_text(code)
        return name

    return write


def test_a_function_gives_c_itself(module):
    name = module("def short(texts):\n    return [len(text) < 4 for text in texts]\n", "oracle_short")
    oracle = load_oracle(f"{name}:short")
    assert oracle.name == f"{name}:short"
    assert oracle.satisfaction(["abc", "abcd"]).tolist() == [1.0, 0.0]


def test_nan_stays_nan_for_the_caller_to_count():
    labels = FunctionOracle(lambda texts: [0.2, math.nan], "f").satisfaction(["a", "b"])
    assert labels[0] == pytest.approx(0.2)
    assert math.isnan(labels[1])


@pytest.mark.parametrize(
    "values", [(0.1, 0.2), np.array([0.1, 0.2], dtype=np.float32), torch.tensor([0.1, 0.2]), [0, 1]],
    ids=["tuple", "numpy", "torch", "integers"],
)  # fmt: skip
def test_any_sequence_of_numbers_will_do(values):
    assert FunctionOracle(lambda texts: values, "f").satisfaction(["a", "b"]).shape == (2,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], r"given 2 texts and returned an array of shape \(1,\)"),
        ([0.5, 1.2], r"returned 1.2 for text 1 \(1 of 2 texts concerned\)"),
        ([-0.1, 0.5], "returned -0.1 for text 0"),
        ([math.inf, 0.5], "returned inf for text 0"),
        (["0.1", "0.2"], "no list of numbers .elements of type str"),
        ("high", "no list of numbers"),
        (None, r"shape \(\)"),
        (0.5, r"shape \(\)"),
        ([[0.1], [0.2]], r"shape \(2, 1\)"),
    ],
)
def test_a_function_with_a_bad_answer(values, message):
    with pytest.raises(ScorerError, match=message):
        FunctionOracle(lambda texts: values, "f").satisfaction(["a", "b"])


def test_a_function_that_raises():
    def broken(texts):
        raise KeyError("weights")

    with pytest.raises(ScorerError, match="Scorer 'f' failed on 1 texts with KeyError: 'weights'"):
        FunctionOracle(broken, "f").satisfaction(["a"])


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(ScorerError, match="got one string"):
        FunctionOracle(lambda texts: [0.5], "f").satisfaction("abc")


def test_a_module_that_is_not_there():
    with pytest.raises(InputError, match="needs a module 'no_such_oracle', which cannot be imported"):
        load_oracle("no_such_oracle:score")


def test_a_module_that_fails_while_it_is_imported(module):
    name = module("1 / 0\n", "oracle_broken")
    with pytest.raises(InputError, match="cannot be imported: division by zero"):
        load_oracle(f"{name}:score")


def test_a_function_that_is_not_there(module):
    name = module("limit = 3\n", "oracle_empty")
    with pytest.raises(InputError, match="has no 'score' to use as oracle"):
        load_oracle(f"{name}:score")
    with pytest.raises(InputError, match="must be a function .* but it is a int"):
        load_oracle(f"{name}:limit")


def test_a_power_for_a_function(module):
    name = module("def score(texts):\n    return [1.0] * len(texts)\n", "oracle_power")
    with pytest.raises(InputError, match="is a function that gives C itself; leave them out"):
        load_oracle(f"{name}:score", power=2.0)
    with pytest.raises(InputError, match="leave them out"):
        load_oracle(f"{name}:score", threshold=0.5)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan, math.inf])
def test_a_power_that_is_none(power):
    with pytest.raises(InputError, match="power must be above 0"):
        load_oracle("bundled", power=power)


@pytest.mark.parametrize("threshold", [0.0, 1.5, math.nan])
def test_a_threshold_outside_its_range(threshold):
    with pytest.raises(InputError, match="threshold must be above 0 and at most 1"):
        load_oracle("bundled", threshold=threshold)
