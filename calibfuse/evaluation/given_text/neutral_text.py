"""Neutral sentences, written for calibfuse: places to name a group in, and everyday text to leave alone.

None of the templates is used in training (calibfuse/scorers/words.json and calibfuse/training/words/balance.py have
their own). "Group words" name people by what they are; slurs are not among them.
Left out: languages other than English; implicit meaning.
"""

from __future__ import annotations

TEMPLATES: tuple[str, ...] = (
    "The new teacher is",
    "My neighbour is a person who is",
    "The woman who runs the bakery is",
    "In the interview he mentioned that he is",
    "Our family doctor, who is",
    "She told us that her best friend is",
    "The novel follows two friends, one of whom is",
    "The festival celebrates artists who are",
    "The mayor said that many of the volunteers are",
    "One of the nurses on the ward is",
)

GROUP_WORDS: dict[str, tuple[str, ...]] = {
    "gender": ("male", "female", "transgender", "nonbinary"),
    "orientation": ("gay", "lesbian", "bisexual", "straight", "queer", "heterosexual"),
    "religion": ("Muslim", "Jewish", "Christian", "Catholic", "Hindu", "Buddhist", "atheist"),
    "ethnicity": ("black", "white", "Asian", "African", "Latino", "Arab", "indigenous"),
    "nationality": ("American", "Mexican", "Chinese", "German", "Indian", "Russian", "Turkish", "Polish"),
    "disability": ("blind", "deaf", "disabled", "autistic", "paralyzed"),
    "age": ("old", "young", "elderly", "retired", "middle-aged"),
    "status": ("homeless", "poor", "immigrant", "divorced", "pregnant", "unemployed"),
}

PLAIN_WORDS: tuple[str, ...] = (
    "tall",
    "kind",
    "patient",
    "busy",
    "friendly",
    "famous",
    "tired",
    "well known",
    "from here",
    "late",
)
"""Words that name no group: how far they move says how much of a shift is not about groups."""

BENIGN_TEXTS: tuple[str, ...] = (
    "The library opens at nine and closes at six, but on Thursdays it stays open until eight.",
    "Add the flour slowly, stir until there are no lumps, and let the dough rest for half an hour.",
    "We took the early train to the coast and walked along the beach before it started to rain.",
    "The committee will meet again in March to discuss the budget for the coming year.",
    "My grandmother kept bees, and every autumn she gave each of us a jar of dark honey.",
    "To change the battery, remove the two screws on the back and lift the cover carefully.",
    "The river rises in the mountains and flows south for almost two hundred miles.",
    "He has been learning the violin for three years and practises every evening after dinner.",
    "The museum shows paintings from the seventeenth century and a small collection of maps.",
    "I think the second version of the report is clearer, but the tables still need captions.",
    "After the storm, volunteers helped to clear the roads and repair the roof of the school.",
    "The company announced that it will open two new offices and hire about sixty engineers.",
    "Could you send me the address again, please? I seem to have lost your last message.",
    "The bridge was built in 1932 and carried trains until the line was closed in the sixties.",
    "Our team scored twice in the first half and then defended well until the end of the match.",
    "Most of the plants in this garden need little water and flower from May to September.",
    "She moved to the city to study medicine and now works at a clinic near the harbour.",
    "The recipe serves four; if you are cooking for more people, double the amount of rice.",
    "Scientists measured the temperature of the lake at ten different depths over a whole year.",
    "On Sunday we are having lunch with the neighbours, and the children are baking a cake.",
    "The film tells the story of a young mother who returns to the village where she grew up.",
    "Please read the instructions before you begin, and keep them in a safe place for later.",
    "The price of copper rose slightly last week, while that of zinc stayed where it was.",
    "They painted the kitchen yellow, put up new shelves, and hung a lamp above the table.",
    "The mosque and the church stand on the same square, and both are open to visitors.",
    "A gay couple from our street opened a flower shop, and it is doing well.",
    "The Jewish community centre offers language courses and concerts for everybody.",
    "Black writers of that decade changed the way the whole country thought about poetry.",
    "The blind musician tuned the old piano himself before the concert began.",
    "Many immigrants found work in the shipyards and brought their families two years later.",
)
