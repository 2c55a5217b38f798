"""A whole evaluation on tiny models: comparison, resuming, reports, and the choice of a strength."""

import html.parser
import json
import math
import re

import numpy as np
import pytest
import torch
from tiny_calibrators import make_calibrator
from transformers import LogitsProcessor

from calibfuse.calibrator import Calibrator
from calibfuse.errors import InputError, ScorerError
from calibfuse.evaluation import LanguageModel, Method, Prompt, SamplingConfig, evaluate, to_data, to_markdown
from calibfuse.evaluation.charts import Point, bars, curves
from calibfuse.evaluation.measure_files import load_measured, save_measured
from calibfuse.evaluation.metrics import Estimate
from calibfuse.evaluation.page import to_html
from calibfuse.evaluation.picking import pick_alpha, write_recommendation
from calibfuse.evaluation.report import write_report
from calibfuse.fusion import FusionConfig
from calibfuse.scorers import load_scorer

PROMPTS = [
    Prompt("line 1", "The river", 0.1, "nature"),
    Prompt("line 2", "She said <b>that</b> & then", 0.2, "people"),
    Prompt("line 3", "A long walk through the town", 0.3, "people"),
]
SAMPLING = SamplingConfig(samples=4, max_new_tokens=5)
OPTIONS = {"sampling": SAMPLING, "resamples": 50, "speed_rounds": 1, "benign_texts": ["It rained all day."]}


class Lower(LogitsProcessor):
    """Lowers the ids from 300 on, which the scorer of these tests calls toxic."""

    def __init__(self, by):
        self.by = by

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, 300:] -= self.by
        return scores


def lowering(by):
    config = FusionConfig(alpha=by)
    return Method(f"lower-{by:g}", f"lower by {by:g}", lambda: [Lower(by)], "lower", by, {"fusion": config.to_dict()})


@pytest.fixture(scope="module")
def target(byte_level_tokenizer, wrap_tokenizer, tiny_llama):
    tokenizer = wrap_tokenizer(byte_level_tokenizer)
    return LanguageModel("tiny", tiny_llama(len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def scorer(target):
    def share_of_rare_ids(texts):
        rows = [target.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return [sum(token_id >= 300 for token_id in row) / max(1, len(row)) for row in rows]

    return load_scorer(share_of_rare_ids)


@pytest.fixture(scope="module")
def evaluation(target, scorer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    return evaluate(target, [lowering(1.0), lowering(30.0)], PROMPTS, scorer, folder, judge=target, **OPTIONS)


def test_plain_comes_first_and_methods_are_compared_with_it(evaluation):
    plain, weak, strong = evaluation.results
    assert [result.method.key for result in evaluation.results] == ["plain", "lower-1", "lower-30"]
    assert plain.changes == plain.differences == {}
    assert plain.neutrality is None
    toxicity = [result.estimates["mean_toxicity"].value for result in (plain, weak, strong)]
    assert toxicity[0] > toxicity[1] > toxicity[2]
    assert strong.differences["mean_toxicity"].value == pytest.approx(toxicity[2] - toxicity[0])
    assert strong.changes["mean_toxicity"].value == pytest.approx(toxicity[2] / toxicity[0] - 1)
    assert 0.0 < weak.neutrality.divergence < strong.neutrality.divergence
    assert all(result.speed.tokens_per_second > 0 for result in evaluation.results)


def test_groups_of_prompts_have_figures_of_their_own(evaluation):
    plain = evaluation.results[0]
    assert list(plain.groups) == ["nature", "people"]
    shares = [plain.groups[group]["mean_toxicity"].value for group in ("nature", "people")]
    assert plain.estimates["mean_toxicity"].value == pytest.approx((shares[0] + 2 * shares[1]) / 3)


def test_perplexity_is_under_the_judge_and_under_the_target(evaluation):
    for result in evaluation.results:
        assert 1.0 < result.estimates["perplexity"].value < math.inf
        assert 1.0 < result.estimates["target_perplexity"].value < math.inf


def test_a_method_that_does_nothing_changes_nothing(target, scorer, tmp_path):
    nothing = Method("nothing", "nothing", lambda: [Lower(0.0)])
    result = evaluate(target, [nothing], PROMPTS, scorer, tmp_path, **OPTIONS).results[1]
    for name, change in result.differences.items():
        if name != "tokens_per_second":
            assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0), name


def test_a_resumed_run_samples_and_scores_nothing_again(target, scorer, tmp_path):
    methods = [lowering(2.0)]
    first = evaluate(target, methods, PROMPTS, scorer, tmp_path, **OPTIONS)

    class Broken:
        name = scorer.name

        def score(self, texts):
            if len(texts) > 3:  # three texts tell versions of a scorer apart
                raise AssertionError("scored again")
            return scorer.score(texts)

    again = evaluate(target, methods, PROMPTS, Broken(), tmp_path, resume=True, **OPTIONS)
    assert [each.estimates["mean_toxicity"] for each in again.results] == [
        each.estimates["mean_toxicity"] for each in first.results
    ]
    with pytest.raises(ScorerError, match="scored again"):
        evaluate(target, methods, PROMPTS[:2], Broken(), tmp_path, resume=True, **OPTIONS)


def test_resuming_another_method_or_target_is_refused(target, scorer, tmp_path, tiny_llama):
    evaluate(target, [], PROMPTS, scorer, tmp_path, **OPTIONS)
    other = LanguageModel("tiny", tiny_llama(len(target.tokenizer), seed=1), target.tokenizer)
    with pytest.raises(InputError, match=r"other settings \(target_weights\)"):
        evaluate(other, [], PROMPTS, scorer, tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: [0.5] * (len(texts) - 1), "array of shape"),
        (lambda texts: [math.nan] * len(texts), "returned nan"),
        (lambda texts: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["count", "nan", "raises"],
)
def test_a_failed_score_is_an_error_and_never_a_number(target, tmp_path, function, message):
    class Failing:
        name = "failing"

        def score(self, texts):
            return [0.5] * 3 if len(texts) == 3 else function(texts)

    with pytest.raises(ScorerError, match=message):
        evaluate(target, [], PROMPTS, Failing(), tmp_path, **OPTIONS)


def test_names_must_differ_and_there_must_be_prompts(target, scorer, tmp_path):
    with pytest.raises(InputError, match="method 'plain' was given twice"):
        evaluate(target, [Method("plain", "x", list)], PROMPTS, scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="prompt 'line 1' was given twice"):
        evaluate(target, [], [PROMPTS[0], PROMPTS[0]], scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="at least one prompt"):
        evaluate(target, [], [], scorer, tmp_path, **OPTIONS)
    with pytest.raises(InputError, match="key of a method"):
        Method("../x", "x", list)


# ---- measures on disk


def test_measures_survive_their_file_and_other_settings_do_not_match(evaluation, tmp_path):
    measured = evaluation.results[1].measured
    save_measured(tmp_path / "m.json", measured, {"a": [1, None]})
    found = load_measured(tmp_path / "m.json", {"a": [1, None]})
    assert found.first == measured.first
    assert found.worst == measured.worst
    assert all(np.array_equal(found.sums[name].numerator, each.numerator) for name, each in measured.sums.items())
    assert load_measured(tmp_path / "m.json", {"a": [2, None]}) is None
    assert load_measured(tmp_path / "none.json", {}) is None
    (tmp_path / "m.json").write_text((tmp_path / "m.json").read_text()[:-50])
    assert load_measured(tmp_path / "m.json", {"a": [1, None]}) is None


# ---- reports


class Page(html.parser.HTMLParser):
    """Collects the tags and the text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_data_are_strict_json_and_complete(evaluation):
    data = json.loads(json.dumps(to_data(evaluation), allow_nan=False))
    assert data["versions"]["torch"] == torch.__version__
    assert data["facts"]["sampling"]["seed"] == 0
    method = data["methods"][2]
    assert set(method["metrics"]["toxic_share"]) == {"value", "low", "high"}
    assert method["neutrality"]["kept_by_group"]
    assert method["change_against_plain"]["toxic_share"]["value"] <= 0
    assert len(method["first_examples"]) == 3
    assert "first_examples" not in to_data(evaluation, with_examples=False)["methods"][0]


def test_markdown_tables_have_equal_columns(evaluation):
    lines = to_markdown(evaluation).splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 10
    for one, other in zip(lines, lines[1:], strict=False):
        if one.startswith("|") and other.startswith("|"):
            assert one.count(" | ") == other.count(" | ")


def test_the_page_needs_no_other_file_and_what_models_say_is_text(evaluation):
    page = Page()
    content = to_html(evaluation)
    page.feed(content)
    names = {tag for tag, _ in page.tags}
    assert "svg" in names
    assert names.isdisjoint({"script", "link", "img", "iframe", "b"})
    assert not re.search(r"""(src|href)=|url\(|@import""", content)
    assert "She said <b>that</b> & then" in page.text


def test_examples_are_masked_on_the_page(evaluation):
    said = evaluation.results[0].measured.first[0].continuation
    content = to_html(evaluation, mask=lambda text: "*" * len(text))
    assert "The river" not in content
    assert len(said) < 3 or said not in content


def test_reports_are_written_together(evaluation, tmp_path):
    write_report(evaluation, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]


def test_charts_place_points_and_take_missing_numbers():
    good = Point("1", Estimate(20.0, 19.0, 21.0), Estimate(0.1, 0.05, 0.2))
    bad = Point("2", Estimate(math.inf, math.nan, math.nan), Estimate(0.1, math.nan, math.nan))
    chart = curves({"<a>": [good, bad]}, x_title="x", y_title="y")
    assert chart.count("<circle") == 1
    assert "&lt;a&gt;" in chart
    assert "nan" not in chart
    assert curves({"a": [bad]}, x_title="x", y_title="y") == ""
    figures = {"row": {"one": Estimate(0.5, math.nan, math.nan), "two": Estimate(math.nan, math.nan, math.nan)}}
    chart = bars(figures, title="t", reference=1.0)
    assert chart.count("<rect") == 1
    assert "nan" not in chart
    assert bars({}, title="t") == ""


# ---- the choice of a strength


def with_figures(evaluation, changes):
    """The evaluation with perplexity changes put in by hand."""
    from dataclasses import replace

    results = [evaluation.results[0]]
    for result, change in zip(evaluation.results[1:], changes, strict=True):
        results.append(replace(result, changes={**result.changes, "perplexity": Estimate(change, change, change)}))
    return replace(evaluation, results=tuple(results))


@pytest.mark.parametrize(
    ("changes", "budget", "picked"),
    [
        ((0.01, 0.04), 0.05, "lower-30"),
        ((0.01, 0.06), 0.05, "lower-1"),
        ((0.10, 0.06), 0.05, None),
        ((-0.2, 0.0), 0.0, "lower-30"),
    ],
)
def test_the_most_effective_strength_within_the_budget_is_picked(evaluation, changes, budget, picked):
    choice = pick_alpha(with_figures(evaluation, changes), budget)
    assert (choice.result.method.key if choice.result else None) == picked
    assert choice.measured_by == "perplexity"
    assert ("largest strength that was tried" in choice.reason) == (picked == "lower-30")


def test_a_negative_budget_is_refused(evaluation):
    with pytest.raises(InputError, match="at least 0"):
        pick_alpha(evaluation, -0.1)


def test_the_choice_is_written_where_from_pretrained_finds_it(tmp_path, target):
    from calibfuse.processor import CalibFusion

    source = make_calibrator().save_pretrained(tmp_path / "mine", dtype=torch.float32)
    weights = (source / "model.safetensors").read_bytes()
    fusion = FusionConfig(alpha=2.5, one_sided=False).to_dict()
    write_recommendation(source, tmp_path / "copy", fusion)
    assert Calibrator.from_pretrained(source).config.fusion == {}
    write_recommendation(source, source, fusion)
    for folder in (source, tmp_path / "copy"):
        assert (folder / "model.safetensors").read_bytes() == weights
        found = CalibFusion.from_pretrained(folder, tokenizer=target.tokenizer)
        assert (found.config.alpha, found.config.one_sided) == (2.5, False)
