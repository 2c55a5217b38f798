"""The model card: valid metadata whatever the facts, everything told is in it, nothing else is claimed."""

import yaml
from huggingface_hub import ModelCard

from calibfuse.hub.model_card import calibrator_card, with_metadata

FACTS = {
    "name": "Quiet",
    "repo_id": "org/quiet",
    "license": "Apache-2.0",
    "data": {"non_toxic": "posts, 10 MB", "reference": ["posts", "novels"]},
    "settings": {"steps": 12_000, "learning_rate": 3e-4, "resumed": False},
    "seed": 7,
    "fusion": {"mode": "contrast", "alpha": 1.5},
    "bits_per_byte": {"byte-level": {"calibrator": 1.5, "reference": 1.25}, "unigram": {"reference": 1.3}},
    "figures": {"toxic continuations": "down by 75 %"},
    "limits": "English only.",
}


def metadata(card):
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_the_metadata_tell_the_hub_what_it_is():
    found = metadata(calibrator_card(FACTS))
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "calibfuse"
    assert {"calibfuse", "detoxification"} <= set(found["tags"])


def test_the_hub_finds_data_base_and_results():
    base = {"name": "org/base", "license": "mit", "data": ["novels"], "inherited": ["body", "436 words"]}
    data = {"files": ["own.txt"], "passages": 3}
    figures = {"toxic continuations": 0.25, "judge": "a scorer", "ok": True}
    card = calibrator_card({**FACTS, "data": data, "datasets": ["org/more"], "base": base, "figures": figures})
    found = ModelCard(card).data
    assert (found.pipeline_tag, found.library_name, found.language) == ("text-generation", "calibfuse", "en")
    assert found.datasets == ["org/more"]
    assert found.base_model == "org/base"
    assert {result.metric_name: result.metric_value for result in found.eval_results} == {
        "Bits per byte (byte-level, calibrator head)": 1.5,
        "Bits per byte (byte-level, reference head)": 1.25,
        "Bits per byte (unigram, reference head)": 1.3,
        "toxic continuations": 0.25,
    }
    for text in ("- name: org/base", "- license: mit", "- data: novels", "- inherited: body, 436 words"):
        assert text in card
    bundled = metadata(calibrator_card({"base": {**base, "name": "calibfuse default calibrator"}}))
    assert "base_model" not in bundled, "only what is on the Hub has an id there"


def test_a_card_of_the_users_own_gets_metadata_where_it_has_none():
    generated = calibrator_card(FACTS)
    own = with_metadata("# Mine\n", generated)
    assert metadata(own) == metadata(generated)
    assert own.endswith("---\n\n# Mine\n")
    assert with_metadata(generated, calibrator_card({})) == generated


def test_every_fact_is_in_the_card():
    card = calibrator_card(FACTS)
    for text in (
        "# Quiet",
        'from_pretrained("org/quiet", tokenizer=tokenizer)',
        "- non toxic: posts, 10 MB",
        "- reference: posts, novels",
        "- steps: 12,000",
        "- learning rate: 0.0003",
        "- resumed: no",
        "- seed: 7",
        "- mode: contrast",
        "| tokenizer style | calibrator head | reference head |",
        "| byte-level | 1.500 | 1.250 |",
        "| unigram | - | 1.300 |",
        "- toxic continuations: down by 75 %",
        "- English only.",
    ):
        assert text in card


def test_without_facts_the_card_claims_none():
    card = calibrator_card({})
    assert "license" not in metadata(card)
    assert not any(heading in card for heading in ("## Training data", "## Settings", "## Figures", "## Recommended"))
    assert "## Limits" in card


def test_no_fact_breaks_the_metadata_or_a_list():
    hostile = "yes: no\n---\n# heading \"quoted\" 'single'"
    card = calibrator_card({"license": hostile, "language": [hostile], "data": hostile, "settings": {"x": hostile}})
    found = metadata(card)
    assert found["license"] == hostile.lower()
    assert found["language"] == [hostile]
    assert "\n# heading" not in card.split("---\n", 2)[2]


def test_the_facts_are_not_changed():
    facts = {"settings": {"steps": 1}, "seed": 2}
    calibrator_card(facts)
    assert facts == {"settings": {"steps": 1}, "seed": 2}
