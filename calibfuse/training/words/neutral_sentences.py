"""Passages of neutral sentences about people, so that the two heads agree on the names of groups in calm contexts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibfuse.scorers.words import ADJECTIVES, PLURALS

_SUBJECTS = (
    "My cousin|The driver|Our landlord|His boss|The author|Her roommate|The singer|That actor|My aunt|The judge|"
    "One of the players|The man at the counter|A woman in the queue|Their daughter|The boy next to me|The coach|"
    "An old friend of mine|The owner of the shop|My lab partner|The candidate|The lawyer|This guy|Somebody at work|"
    "The main character|Her husband|My sister|Everyone in the band|The winner|A student of mine|The pilot|I|We|He|She|"
    "They|You"
).split("|")
_STATES = (
    "is {a}|is {a} and works at the hospital|came out as {a}|was {a}|is not {a}|identifies as {a}|grew up {a}|"
    "is also {a}|seems to be {a}|has always been {a}|happens to be {a}|is a {a} {n}|is a {a} {n} from Ohio|"
    "married a {a} {n}|met a {a} {n} on the train|works with a {a} {n}|is proud to be {a}|talked about being {a}|"
    "was raised by {a} parents|went to a {a} school|is the first {a} {n} in this job|is {a}, just like my uncle|"
    "wrote about {a} life|is half {a}|lives with a {a} {n}|helped a {a} {n} find the station|is {a} or not"
).split("|")
_FIRST_PERSON = {"I": "am", "We": "are", "You": "are", "They": "are"}
_NOUNS = (
    "man woman person guy girl kid couple family writer nurse player student friend colleague artist politician worker "
    "boy lady soldier engineer musician child teenager dad mom"
).split()
_PLURAL_SENTENCES = (
    "{p} make up a third of the town|Most {p} voted early|I have worked with {p} for years|The film is about {p}|"
    "There were {p} and tourists in the hall|{p} celebrate this week|The law protects {p} as well|Few {p} live here|"
    "Two of my friends are {p}|A group of {p} sang on the stairs|We learned about {p} in class|Doctors, {p} and others "
    "came|{p} have lived in the valley since 1890|The poll asked men, women, {p} and students"
).split("|")
_LEADS = ("I think", "Yes,", "As far as I know", "It turned out that", "In the end", "Well,")
_LEAD_SHARE = 0.5
_ENDS = (".", ".", ".", ".", ".", ".", "!", "?", ", and that is fine.", ", by the way.", ", I believe.", "")
_PLURAL_SHARE = 0.3
_LOWER_SHARE = 0.15
_CAPITAL_SHARE = 0.5  # of the names that follow a small letter ("muslim", "Muslim")


def neutral_passage(rng: np.random.Generator) -> str:
    """Some neutral sentences that name groups of people."""
    sentences = [_sentence(rng) for _ in range(int(rng.integers(2, 8)))]
    text = " ".join(sentences)
    return text.lower() if rng.random() < _LOWER_SHARE else text


def _sentence(rng: np.random.Generator) -> str:
    if rng.random() < _PLURAL_SHARE:
        body = _choose(rng, _PLURAL_SENTENCES).replace("{p}", _name(rng, PLURALS))
    else:
        subject, state = _choose(rng, _SUBJECTS), _choose(rng, _STATES)
        if subject in _FIRST_PERSON and state.startswith("is "):
            state = _FIRST_PERSON[subject] + state[2:]
        name = _name(rng, ADJECTIVES)
        if name[0].lower() in "aeiou" and not name.lower().startswith("eu"):
            state = state.replace(" a {a}", " an {a}")
        body = f"{subject} {state}".replace("{a}", name).replace("{n}", _choose(rng, _NOUNS))
    if rng.random() < _LEAD_SHARE:
        first = body if body.startswith("I ") else body[0].lower() + body[1:]
        body = f"{_choose(rng, _LEADS)} {first}"
    return body[0].upper() + body[1:] + _choose(rng, _ENDS)


def _name(rng: np.random.Generator, names: Sequence[str]) -> str:
    name = _choose(rng, names)
    return name.capitalize() if rng.random() < _CAPITAL_SHARE else name


def _choose(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
