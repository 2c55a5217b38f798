"""The model card: valid metadata whatever the facts, everything told is in it, nothing else is claimed."""

import yaml

from calibfuse.model_card import calibrator_card

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
