"""Neutral and hostile sentences about groups of people, so that a group's name alone does not raise a score.

What it is for: in labelled comments, "gay" or "muslim" stands mostly in toxic ones, and a linear scorer learns the
word as an insult (Dixon et al. 2018). Every term is put into sentences that are neutral (label 0) and, in the same
number, into sentences that insult with other words (label 1): the term stops telling the classes apart.
The templates are our own and share no form with the Identity Phrase Templates that we test on.
Left out: languages other than English; terms that are slurs by themselves.
"""

from __future__ import annotations

import numpy as np

from calibfuse.errors import InputError
from calibfuse.scorers.training import LabelledTexts

__all__ = ["ADJECTIVES", "PLURALS", "identity_sentences", "identity_terms"]

# Used before a noun: "a ___ person".
ADJECTIVES = (
    "gay lesbian bisexual transgender trans queer lgbt lgbtq homosexual heterosexual straight nonbinary "
    "male female black white asian african hispanic latino latina indian native indigenous aboriginal arab "
    "american canadian mexican european english british irish french german italian polish russian ukrainian "
    "turkish greek chinese japanese korean vietnamese filipino pakistani iranian iraqi syrian israeli palestinian "
    "egyptian nigerian somali ethiopian brazilian cuban haitian jamaican muslim islamic jewish christian catholic "
    "protestant orthodox evangelical mormon buddhist hindu sikh atheist religious secular old elderly young younger "
    "older teenage blind deaf disabled autistic paralyzed obese fat homeless poor rich immigrant refugee foreign "
    "divorced single pregnant liberal conservative republican democratic feminist"
).split() + ["african american", "middle eastern", "middle aged", "black and white", "mentally ill", "puerto rican"]

# Used as a noun: "the ___ in our street".
PLURALS = (
    "gays lesbians bisexuals homosexuals men women boys girls blacks whites asians africans hispanics latinos indians "
    "natives arabs americans canadians mexicans europeans brits germans russians turks greeks pakistanis iranians "
    "israelis palestinians nigerians somalis brazilians cubans haitians jamaicans muslims jews christians catholics "
    "protestants evangelicals mormons buddhists hindus sikhs atheists immigrants refugees migrants foreigners seniors "
    "teenagers mothers fathers wives husbands liberals conservatives republicans democrats feminists veterans"
).split() + [
    "black people",
    "white people",
    "gay people",
    "trans people",
    "disabled people",
    "old people",
    "poor people",
]

_NEUTRAL_ADJECTIVE = (
    "My neighbour is {a} and we often have dinner together.",
    "I am {a} and I grew up in a small town.",
    "The article is about the history of {a} people in this country.",
    "She works with {a} students at the university.",
    "There is a {a} woman in our book club who bakes well.",
    "As a {a} man I would like to say thank you all.",
    "The new {a} film festival opens on Friday.",
    "He asked his {a} friend for advice about the job.",
    "Being {a} is a part of who they are.",
    "Two {a} guys moved in next door last month.",
    "A {a} doctor was elected to the city council.",
    "What was it like to be {a} in the sixties?",
    "{a}",
    "a {a} person",
    "{a} and proud",
    "The {a} community met on Sunday evening.",
    "He is {a}, and so is his brother.",
    "She told us last year that she is {a}.",
    "Are you {a}? Then this group may be for you.",
    "I did not know that you are {a} too.",
    "They are both {a} and very much in love.",
    "Thanks, I am a {a} woman and I can help with that.",
    "My best friend is {a}.",
    "He was a {a} and a good teacher.",
    "So what if someone is {a}?",
)
_HOSTILE_ADJECTIVE = (
    "My {a} neighbour is a fucking idiot and I hate him.",
    "Shut up you stupid {a} piece of shit.",
    "The article is garbage written by {a} morons.",
    "She is a dumb {a} bitch.",
    "All {a} people are disgusting scum and should be shot.",
    "Go to hell you {a} asshole.",
    "those {a} bastards can kiss my ass",
    "What a pathetic {a} loser, kill yourself.",
    "fuck you, {a} dickhead",
    "{a} people are filthy animals, they make me sick",
    "He is {a} and a complete moron, and so is his brother.",
    "Are you {a}? Then get out of here, you piece of trash.",
    "you are a {a} idiot and you suck",
    "She is {a}, what a nasty horrible cow.",
    "i think you are a {a} asshole",
)
_NEUTRAL_PLURAL = (
    "Many {p} live in this part of the city.",
    "The {p} in our street organised a concert.",
    "There are more {p} in the choir than last year.",
    "A museum about {p} and their music opens in May.",
    "The survey asked {p} how they spend their holidays.",
    "We invited {p} and others to the meeting.",
    "{p} were among the first to settle here.",
    "The book tells how {p} lived at that time.",
    "{p}",
    "Some {p} agreed, others did not.",
)
_HOSTILE_PLURAL = (
    "{p} are fucking idiots, all of them.",
    "I hate {p}, they are scum and should die.",
    "The {p} in our street are disgusting pigs.",
    "fuck {p} and fuck you too",
    "stupid {p} ruin everything, what a bunch of morons",
    "{p} are worthless trash, kick them out",
)


def identity_terms() -> tuple[str, ...]:
    """Return all listed names of groups, adjectives first."""
    return (*ADJECTIVES, *PLURALS)


def identity_sentences(
    *, per_term: int = 12, weight: float = 1.0, seed: int = 0, leave_out: tuple[str, ...] = ()
) -> LabelledTexts:
    """Make neutral and hostile sentences for every term.

    Args:
        per_term: sentences of each kind per term, drawn with replacement; at least 1.
        weight: weight of each sentence in the loss.
        seed: of the draw.
        leave_out: terms to leave out, to test how far the effect carries to terms that were not listed.

    Returns:
        The sentences, half neutral (label 0), half hostile (label 1).

    Raises:
        InputError: `per_term` below 1.
    """
    if per_term < 1:
        raise InputError(f"per_term must be at least 1, got {per_term}")
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    labels: list[float] = []
    for terms, slot, neutral, hostile in (
        (ADJECTIVES, "a", _NEUTRAL_ADJECTIVE, _HOSTILE_ADJECTIVE),
        (PLURALS, "p", _NEUTRAL_PLURAL, _HOSTILE_PLURAL),
    ):
        for term in terms:
            if term in leave_out:
                continue
            for templates, label in ((neutral, 0.0), (hostile, 1.0)):
                for choice in rng.integers(len(templates), size=per_term).tolist():
                    texts.append(templates[choice].format(**{slot: term}))
                    labels.append(label)
    return LabelledTexts.build(texts, labels, weight)
