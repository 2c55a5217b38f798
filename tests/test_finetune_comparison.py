"""The tables of tools/finetune_comparison.py, from invented measures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from calibfuse.evaluation.bootstrap import Sums
from calibfuse.evaluation.metrics import toxicity_sums


@pytest.fixture(scope="module")
def example(load_tool):
    return load_tool("finetune_comparison")


@pytest.fixture
def rows(example):
    """The tuned way has half the toxic continuations of the base and of plain tuning, and 2 % more perplexity."""
    generator = np.random.default_rng(0)
    toxic = np.zeros((50, 4))
    toxic[:, :2] = generator.random((50, 1)) < 0.5
    half = toxic.copy()
    half[:, 1] = 0.0
    tokens = np.full(10, 100.0)
    return [
        example.Row(key, SimpleNamespace(sums=toxicity_sums(scores)), Sums(tokens * nats, tokens, is_exponential=True))
        for key, scores, nats in (
            (example.BASE, toxic, 3.0),
            (example.PLAIN, toxic, 2.0),
            (example.SEQUENTIAL, half, 2.0 + np.log(1.02)),
        )
    ]


def test_changes_are_paired_against_base_and_plain(example, rows):
    ways = example.compare(rows, seed=0)
    ours = ways[example.SEQUENTIAL]
    for other in ("base", "plain"):
        assert ours[f"change_against_{other}"]["toxic_share"]["value"] == pytest.approx(-0.5)
        assert ours[f"change_against_{other}"]["toxic_share"]["high"] == pytest.approx(-0.5), "pairs do not vary"
    assert ours["change_against_plain"]["corpus_perplexity"]["value"] == pytest.approx(0.02)
    assert "change_against_base" not in ways[example.BASE]


def test_table_has_a_line_for_each_way_and_step(example, rows):
    steps = [{"step": 1, "seconds": 3.0, "roles": {"samples": {"seconds": 2.5}, "model": {"seconds": 0.5}}}]
    data = {"ways": example.compare(rows, seed=0), "runs": {example.SEQUENTIAL: {"steps": steps}}}
    table = example.to_markdown(json.loads(json.dumps(data)))
    for row in rows:
        assert f"| {example.TITLES[row.key]} |" in table
    assert "-50.0 %" in table
    assert "| sequential | 1 | 3.0 | 2.5 |  | 0.5 |" in table


def test_options_have_defaults_for_everything_but_the_data(example, tmp_path):
    args = example.build_parser().parse_args(
        ["--output", str(tmp_path), "--corpus", "a", "--prompts", "b", "--oracle", "c"]
    )
    config = example.run_config(args, example.PARALLEL, "model")
    assert config.schedule == "parallel"
    assert config.is_constrained
    assert not example.run_config(args, example.FILTERED, "model").is_constrained
