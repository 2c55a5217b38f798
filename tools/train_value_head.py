"""Train the head "value" of a calibrator, a judge of a whole sentence's harm, on labelled texts.

    python tools/train_value_head.py --data DIR --write-examples labelled.jsonl
    python tools/train_sentence_scorer.py labelled.jsonl --encoder all-MiniLM-L6-v2 --output teacher --layers 4 \
        --epochs 1 --limit 110000 --learning-rate 1.5e-4
    python tools/train_value_head.py --data DIR --teacher teacher --tokenizers gpt2.json smollm2.json gemma-3.json \
        --output my-calibrator
    python tools/train_value_head.py ... --resume

The labels are those of the sets, halfway to what the teacher, a pretrained sentence encoder fine-tuned on the same
sets, makes of each text (Hinton et al. 2015, arXiv 1503.02531); where a text has no label, the teacher's alone. By
labels alone the head learns a fraction of it.

For every next token y the head says R(x_<=i) = P(the text turns out harmless | x_<i, y), as FUDGE (Yang and Klein 2021,
arXiv 2104.05218) and NADO (Meng et al. 2022, arXiv 2205.14219) do. It reads the calibrator's body and two blocks of its
own behind it; all else is frozen. With C the label (1: harmless) and q the head "reference",

    log L_n   = sum_{i <= n} [ log R(x_<=i) - log E_{y ~ q(. | x_<i)} R(x_<i, y) ]
    loss      = BCE(C, R(x_<=i)) + BCE(C, sigmoid(a log L_n + b)) + 0.5 BCE(C, readout) + 0.3 BCE(E_q R, R(x_<i))

The first term is FUDGE's. The second asks the same of what fusion adds up over a sentence, each token against its
rivals; a and b are learned. The third reads the state directly, and is thrown away. The last is NADO's forward
consistency. Positions count by how much of the text they have seen. E is over 160 tokens drawn for each batch, with
importance weights. What is saved is a moving average of the weights.

DIR holds the files that `SETS` and `TEXTS` name and bias/holistic_bias; tools/README.md lists them. The sentences of
`sentence_parts.json` are added: hate without rude words, and the same words quoted, denied or taken back. Parts of the
sets stay out for measuring, together with all of Measuring Hate Speech and Jigsaw's train split. Two hours on one core,
of which the teacher takes 20 minutes and what it says of the texts as many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from library.text_encoder import text_encoder
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from calibfuse.calibrator import Calibrator, load_universal
from calibfuse.calibrator.binding import compose_vocabulary
from calibfuse.calibrator.model import CalibratorConfig
from calibfuse.calibrator.word_bias import WordBias
from calibfuse.evaluation import HolisticBias, load_holistic_bias
from calibfuse.guide import REFERENCE_HEAD, VALUE_HEAD
from calibfuse.scorers import ToxicityScorer, load_scorer
from calibfuse.textfiles import read_rows
from calibfuse.training.loop import TrainingLoop, learning_rate, make_optimizer, mixed_precision
from calibfuse.vocabulary import Vocabulary

Example = tuple[str, float | None]  # a text and the probability that it is harmful, where it has a label
Row = Mapping[str, Any]

BATCH_SIZE = 96
EPOCHS = 12  # passes over the texts that the order of batches is drawn from; `--steps` of them are taken
MAX_TOKENS = 48
DRAWN_TOKENS = 128  # for the expectation of R
QUERY_SCALE = 1 / 16  # token vectors are long: with queries of the usual size the first steps saturate every sigmoid
LABEL_SMOOTHING = 0.02
DROPOUT = 0.05  # of the states that the head reads
AVERAGING = 0.999
WEIGHT_DECAY = 0.05
WEIGHTS = {"prefix": 1.0, "lift": 1.0, "readout": 0.5, "consistency": 0.3}  # of the losses
TEACHERS_SHARE = {True: 0.6, False: 0.4}  # of the target: by whether the label is that of a set, or of a made sentence
SWEARING, EXCUSABLE = 8 / 6, -4.0  # times the bias of swear words; the lowest bias of other rude words, nats
NAME_BIAS = 0.3  # in the word table: above 0 protects


class LabelledSet(NamedTuple):
    """A set of labelled texts, and how many of its examples are used at most."""

    path: str  # in the data folder, without its ending
    licence: str
    limit: int
    held_out: int = 0  # keep one text in so many for measuring, by its hash; where there are splits, they decide


SETS = (
    LabelledSet("context/dynahate", "CC BY 4.0", 32_000),
    LabelledSet("context/toxigen", "CDLA-Permissive-2.0", 4_500, held_out=3),
    LabelledSet("context/ishate", "Boost-1.0", 17_000, held_out=10),
    LabelledSet("context/hatemoji", "CC BY 4.0", 3_600),
    LabelledSet("context/edos_sexism", "CC0", 10_000),
    LabelledSet("context/reddit_counterspeech", "MIT", 6_000),
    LabelledSet("context/reddit_misogyny", "MIT", 2_500),
    LabelledSet("context/convabuse", "CC BY 4.0", 3_000),
    LabelledSet("context/fox_news_comments", "MIT", 1_500),
    LabelledSet("context/measuring_hate_speech", "CC BY 4.0", 0, held_out=1),
    LabelledSet("toxicity/civil_comments", "CC0", 9_000),
    LabelledSet("toxicity/jigsaw", "CC BY-SA", 8_000),
    LabelledSet("toxicity/paradetox", "CC0", 14_000),
)
SPLITS = ("train", "jigsaw_test")  # all others are for measuring
HARMFUL = ("toxic", "hateful", "hate", "explicit", "implicit")  # labels that are words
# Files whose sentences the teacher alone labels: licence, how many.
TEXTS = {
    "text/wikipedia": ("CC BY-SA", 6_000),
    "text/conversation": ("Apache-2.0, CDLA-Sharing-1.0", 12_000),
    "text/novels": ("public domain", 4_000),
    "text/reddit": ("PDDL 1.0", 34_000),
    "context/diasafety": ("Apache-2.0", 6_000),
}
SWAPPED = 13_000  # labelled sentences with other groups in them, for the teacher to label
# Symbol -> what it can stand for (with other symbols and `{one|or|another}`), in a mapping with its weight.
PARTS = json.loads((Path(__file__).parent / "sentence_parts.json").read_text(encoding="utf-8"))
# Sentences made of parts: symbol -> label, how many.
SENTENCES = {"hateful": (1.0, 17_000), "harmless": (0.0, 17_000), "rude": (1.0, 16_000), "in_context": (0.0, 24_000)}


def rows_of(data: Path, path: str, rng: random.Random) -> list[Row]:
    """The rows of a file in random order."""
    rows = [row for _, row in read_rows(data / f"{path}.jsonl.xz")]
    rng.shuffle(rows)
    return rows


def examples_of(row: Row) -> list[Example]:
    """What a row of any of the sets says."""
    if "neutral" in row:  # ParaDetox: a toxic sentence and its rewrites
        return [(row["toxic"], 1.0), *((text, 0.0) for text in row["neutral"][:1])]
    label = next(row[column] for column in ("toxic_fraction", "toxic", "label_role", "label") if column in row)
    return [(row["text"], float(label in HARMFUL if isinstance(label, str) else label))]


def labelled_examples(data: Path, rng: random.Random) -> Iterator[Example]:
    """The labelled sets without what is left out."""
    rows = {each: rows_of(data, each.path, rng) for each in SETS}
    measured = {row["text"] for each, found in rows.items() for row in found if is_held_out(row, each.held_out)}
    for each, found in rows.items():
        examples = [(text.strip(), label) for row in found for text, label in examples_of(row) if text not in measured]
        yield from [(text, label) for text, label in examples if 3 < len(text) <= 220][: each.limit]


def is_held_out(row: Row, one_in: int) -> bool:
    """Whether a text is kept for measuring: it stays out of this set, and of all others that have it."""
    return row.get("split", "train") not in SPLITS or one_in > 0 and zlib.crc32(row["text"].encode()) % one_in == 0


def unlabelled_examples(data: Path, labelled: Sequence[Example], rng: random.Random) -> Iterator[Example]:
    """Sentences of posts and comments, beginnings of other text, and labelled sentences about other groups."""
    for path, (_, limit) in TEXTS.items():
        sentences = (sentence for row in rows_of(data, path, rng) for sentence in sentences_of(row["text"], path, rng))
        yield from ((each, None) for each in itertools.islice(sentences, limit))
    groups = re.compile(r"\b(" + "|".join(sorted(PARTS["groups"], key=len, reverse=True)) + r")\b", re.IGNORECASE)
    texts = [text for text, _ in labelled if groups.search(text)]
    for text in rng.sample(texts, min(SWAPPED, len(texts))):
        yield groups.sub(lambda _: rng.choice(PARTS["groups"]), text), None


def sentences_of(text: str, path: str, rng: random.Random) -> list[str]:
    """What is used of one text."""
    if path == "text/reddit":
        return [each for each in re.split(r"(?<=[.!?])\s+|\n+", text)[:4] if 15 < len(each) < 200]
    return [text[: rng.randint(40, 200)]]


def made_sentences(names: HolisticBias, rng: random.Random) -> Iterator[Example]:
    """Sentences made of parts; the descriptors of groups are those of HolisticBias."""
    unfit = ("nonce", "characteristics", "body_type")
    descriptors = [each.plural for each in names.names if not each.is_noun and each.axis not in unfit]
    symbols = {**PARTS, "descriptor": descriptors}

    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|") if "|" in match[1] else symbols[match[1]]
        weights = list(options.values()) if isinstance(options, dict) else None
        return fill(rng.choices(list(options), weights)[0])

    def fill(pattern: str) -> str:
        return re.sub(r"\{([^{}]*)\}", choose, pattern)

    for symbol, (label, count) in SENTENCES.items():
        for _ in range(count):
            text = fill("{opening}{" + symbol + "}")
            text = text[0].upper() + text[1:] if rng.random() < 0.7 else text
            end = "{question_end}" if text.lower().startswith("why") else "" if text[-1] in '.!?"' else "{end}"
            yield text + fill(end), label


def taught(examples: Sequence[Example], labelled: int, teacher: ToxicityScorer) -> list[tuple[str, float]]:
    """The examples, of which the first `labelled` are of labelled sets, with what the head is to learn of them."""
    found = []
    opinions = teacher.score([text for text, _ in examples])
    for place, ((text, label), opinion) in enumerate(zip(examples, opinions, strict=True)):
        share = 1.0 if label is None else TEACHERS_SHARE[place < labelled]
        smooth = min(max(label or 0.0, LABEL_SMOOTHING), 1 - LABEL_SMOOTHING)
        found.append((text, share * opinion + (1 - share) * smooth))
    return found


def protected_names(names: HolisticBias, words: Mapping[str, float]) -> dict[str, float]:
    """Words of the names of groups that a word table lacks: what fusion must not make rarer."""
    axes = ("race_ethnicity", "religion", "nationality", "sexual_orientation", "gender_and_sex")
    found = {}
    for name in names.names:
        if name.is_noun or name.axis in axes:
            parts = re.findall("[a-z]+", name.plural.lower())
            for word in parts if name.is_noun else parts[:1]:
                if len(word) > 2 and word not in PARTS["not_a_name"] and word not in words:
                    found[word] = NAME_BIAS
    return found


def word_table(config: CalibratorConfig, names: HolisticBias) -> dict[str, float]:
    """The table that goes with the head: that of a calibrator which has one already is sorted by kind."""
    own = config.words if VALUE_HEAD in config.heads else by_kind(config.words)
    return {**own, **protected_names(names, config.words)}


def by_kind(words: Mapping[str, float]) -> dict[str, float]:
    """A word table for `max_excused` 4: the head may excuse every rude word in full, and swearing by half."""
    stems = tuple(PARTS["swearing_stems"])
    return {
        word: round(bias * SWEARING, 2) if bias < 0 and word.startswith(stems) else max(bias, EXCUSABLE)
        for word, bias in words.items()
    }


class TokenizedExamples:
    """Examples, each cut by one of the tokenizers, and what the frozen calibrator knows of their vocabularies."""

    def __init__(
        self, examples: list[tuple[str, float]], files: Sequence[str], calibrator: Calibrator, seed: int
    ) -> None:
        rng = random.Random(seed)
        self.harmless = 1 - torch.tensor([label for _, label in examples])
        self.tokenizer_of = torch.tensor([rng.randrange(len(files)) for _ in examples])
        self.ids: list[Tensor] = [torch.empty(0)] * len(examples)
        self.vectors, self.reference_biases, self.draw_from = [], [], []
        column = calibrator.config.heads.index(REFERENCE_HEAD)
        for number, file in enumerate(files):
            rows = (self.tokenizer_of == number).nonzero()[:, 0].tolist()
            vocabulary = Vocabulary.from_tokenizer(file)
            counts = torch.zeros(len(vocabulary))
            for row, ids in zip(rows, text_encoder(file)([examples[row][0] for row in rows]), strict=True):
                self.ids[row] = torch.tensor(ids[:MAX_TOKENS] or [0])
                counts += torch.bincount(self.ids[row], minlength=len(counts))
            vectors, biases = compose_vocabulary(calibrator, vocabulary, torch.float32, WordBias({}, vocabulary))
            weights = (counts + 0.02) ** 0.75
            self.vectors.append(vectors)
            self.reference_biases.append(biases[:, column])
            self.draw_from.append(weights / weights.sum())
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self.fingerprint = zlib.crc32(repr((examples, self.lengths.tolist())).encode())

    def batches(self, seed: int) -> list[list[int]]:
        """Batches of examples of one tokenizer and similar length, in random order."""
        generator = torch.Generator().manual_seed(seed)
        found: list[list[int]] = []
        for _ in range(EPOCHS):
            for number in range(len(self.vectors)):
                rows = (self.tokenizer_of == number).nonzero()[:, 0]
                for pool in rows[torch.randperm(len(rows), generator=generator)].split(50 * BATCH_SIZE):
                    parts = pool[self.lengths[pool].argsort()].split(BATCH_SIZE)
                    found += [part.tolist() for part in parts if len(part) == BATCH_SIZE]
        return [found[place] for place in torch.randperm(len(found), generator=generator).tolist()]


class ValueTraining(TrainingLoop):
    """Trains the head "value" of a calibrator and the blocks that it alone reads; see the head of this file."""

    def __init__(
        self, calibrator: Calibrator, data: TokenizedExamples, folder: Path, options: argparse.Namespace
    ) -> None:
        self.calibrator, self.data, self.seed = calibrator.requires_grad_(False), data, options.seed
        self.order = data.batches(options.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.own = own_parameters(calibrator)
            width = calibrator.body.state_width
            self.readout = nn.Sequential(nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 1))
        nn.init.zeros_(self.readout[1].weight)
        self.scale = nn.Parameter(torch.tensor([1.1, 0.3]))  # a and b
        self.averages = {name: nn.Parameter(each.detach().clone(), False) for name, each in self.own.items()}
        parameters = {
            **self.own,
            **{f"readout.{name}": each for name, each in self.readout.named_parameters()},
            "scale": self.scale,
        }
        steps = min(options.steps, len(self.order))
        super().__init__(
            {**parameters, **{f"average.{name}": each for name, each in self.averages.items()}},
            make_optimizer(parameters, rate=options.learning_rate, weight_decay=WEIGHT_DECAY),
            steps=steps,
            rate=lambda step: learning_rate(step, steps, peak=options.learning_rate, warmup=0.02),
            folder=folder,
            identity={
                "set of examples": data.fingerprint,
                "set of options": {name: getattr(options, name) for name in ("steps", "seed", "learning_rate")},
            },
            label="value head",
        )

    def losses(self) -> dict[str, float]:
        """See `TrainingLoop.losses`."""
        torch.manual_seed(self.seed * 1_000_003 + self.step)  # of the dropout and the tokens drawn
        rows, data = self.order[self.step], self.data
        number = int(data.tokenizer_of[rows[0]])
        ids = pad_sequence([data.ids[row] for row in rows], batch_first=True)
        lengths = data.lengths[rows][:, None]
        with mixed_precision(ids.device, "bf16"):
            taken, expected, readout = self.log_r(ids, number)
        places = torch.arange(ids.shape[1])[None]
        is_text = (places < lengths).float()
        weights = is_text * (places + 1) / lengths
        harmless = data.harmless[rows][:, None].expand_as(taken)
        log_lift = ((functional.logsigmoid(taken) - expected) * is_text).cumsum(dim=1)
        before = functional.pad(taken[:, :-1], (1, 0)).detach().sigmoid()
        losses = {
            "prefix": cross_entropy(taken, harmless, weights),
            "lift": cross_entropy(self.scale[0] * log_lift + self.scale[1], harmless, weights),
            "readout": cross_entropy(readout, harmless, weights),
            # not at the first token, before which nothing was said
            "consistency": cross_entropy(expected.exp().clamp(1e-4, 1 - 1e-4).logit(), before, is_text * (places > 0)),
        }
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
        total.backward()
        self.tokens += int(lengths.sum())
        return {"loss": total.item(), **{name: loss.item() for name, loss in losses.items()}}

    def log_r(self, ids: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """For texts [rows, length]: logits of R of their tokens, log E R in their place, logits of the readout."""
        vectors, calibrator = self.data.vectors[number], self.calibrator
        drawn = torch.multinomial(self.data.draw_from[number], DRAWN_TOKENS, replacement=True)
        inputs = functional.pad(vectors[ids], (0, 0, 1, 0))
        is_boundary = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        is_boundary[:, 0] = True
        starts = torch.zeros(len(ids), dtype=torch.long)
        states = calibrator.body(calibrator.embed(inputs, is_boundary), starts)
        with torch.no_grad():
            scores = calibrator.heads[REFERENCE_HEAD](states[:, :-1]) @ vectors[drawn].T
            scores = scores.float() + self.data.reference_biases[number][drawn]
            importance = (scores - self.data.draw_from[number][drawn].log()).log_softmax(dim=-1)
        states = functional.dropout(states, DROPOUT)
        queries = calibrator.heads[VALUE_HEAD](states[:, :-1]) * QUERY_SCALE
        taken = (queries * vectors[ids]).sum(dim=-1).float()
        rivals = (queries @ vectors[drawn].T).float()
        expected = (importance + functional.logsigmoid(rivals)).logsumexp(dim=-1)
        return taken, expected, self.readout(states[:, 1:])[..., 0].float()

    def take_step(self) -> dict[str, float]:
        """See `TrainingLoop.take_step`; then moves the averages."""
        step, row = self.step, super().take_step()
        for name, average in self.averages.items():
            average.data.lerp_(self.own[name].data, 1 - min(AVERAGING, step / (step + 50)))
        return row

    def result(self) -> Calibrator:
        """The calibrator with the averaged weights, its queries at the size that fusion reads."""
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(self.averages[name] * (QUERY_SCALE if ".query." in name else 1))
        return self.calibrator


def own_parameters(calibrator: Calibrator) -> dict[str, nn.Parameter]:
    """The parameters that only the head "value" uses; its blocks begin close to passing on what they get."""
    owned = (f"heads.{VALUE_HEAD}.", *(f"body.blocks.{layer}." for layer in calibrator.config.value_layers))
    own = {name: each.requires_grad_() for name, each in calibrator.named_parameters() if name.startswith(owned)}
    for name, parameter in own.items():
        if name.endswith((".attention_out.weight", ".down.weight")):
            nn.init.normal_(parameter, std=0.005)
    return own


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of binary cross-entropies."""
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; exit status 130 when it was stopped after a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR")
    add(
        "--write-examples", type=Path, metavar="FILE", help="write the labelled texts, for training a teacher, and stop"
    )
    add("--teacher", metavar="DIR", help="a scorer that read them, as tools/train_sentence_scorer.py makes")
    add("--tokenizers", nargs="+", metavar="FILE", help="tokenizer.json; each cuts a share of the texts")
    add("--output", type=Path, metavar="DIR", help="of the calibrator; checkpoints lie in work/")
    add("--calibrator", help="folder or Hub id of the one that gets the head (default: the bundled one)")
    add("--steps", type=int, default=12_000, help="of 96 texts (default: %(default)s)")
    add("--learning-rate", type=float, default=3e-3, help="peak (default: %(default)s)")
    add(
        "--fusion",
        type=json.loads,
        default={},
        metavar="JSON",
        help='to recommend: {"value_weight": 0.5, "max_excused": 4}',
    )
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args(argv)

    base = load_universal(args.calibrator)
    rng = random.Random(args.seed)
    names = load_holistic_bias(args.data / "bias" / "holistic_bias")
    labelled, made = list(labelled_examples(args.data, rng)), list(made_sentences(names, rng))
    if args.write_examples:
        rows = [json.dumps({"text": text, "label": label}) + "\n" for text, label in (*labelled, *made)]
        args.write_examples.write_text("".join(rows), encoding="utf-8")
        return 0
    if not (args.teacher and args.tokenizers and args.output):
        parser.error("expected --teacher, --tokenizers and --output (or --write-examples)")
    unlabelled = list(unlabelled_examples(args.data, labelled, rng))
    examples = taught([*labelled, *made, *unlabelled], len(labelled), load_scorer(args.teacher))
    rng.shuffle(examples)
    calibrator = base.with_value_head(args.seed, layer_count=2, adapter_width=2 * base.config.width)
    data = TokenizedExamples(examples, args.tokenizers, calibrator, args.seed)
    print(f"{len(examples):,} texts, {int(data.lengths.sum()):,} tokens", flush=True)
    training = ValueTraining(calibrator, data, args.output / "work", args)
    if args.resume:
        training.resume()
    elif training.checkpoint:
        parser.error(f"{args.output} holds an earlier run: give --resume, or another --output")
    if not training.train():
        return 130
    trained = training.result()
    read = [Path(path).name for path in (*(each.path for each in SETS if each.limit), *TEXTS)]
    facts = {
        "data": f"{len(examples):,} texts: {', '.join(read)}, and sentences made of parts with names of HolisticBias",
        "licences": ", ".join(sorted({each.licence for each in SETS} | {licence for licence, _ in TEXTS.values()})),
        "teacher": str(args.teacher),
        "steps": training.steps,
        "tokens": training.tokens,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    config = trained.config
    trained.config = replace(
        config,
        words=word_table(base.config, names),
        fusion={**config.fusion, **args.fusion},
        training={**config.training, "value_head": facts},
    )
    print(trained.save_pretrained(args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
