r"""Train a toxicity scorer of another kind than the bundled one: a small language model, tuned on labelled comments.

    python examples/train_neural_scorer.py --base LM --data DATA/toxicity/jigsaw.jsonl.xz --where split=jigsaw_train \
        --distrust-lowercase --identity-terms --output neural-scorer
    python examples/train_neural_scorer.py --base neural-scorer --fold 2/2 \
        --realtoxicityprompts DATA/prompts/realtoxicityprompts.jsonl.xz --output perspective-like
    calibfuse evaluate --scorer bundled neural-scorer perspective-like ...

The bundled scorer is linear in words and parts of words: it flags a made-up word that looks like a rude one, whatever
stands around it. A second judge that reads in order has other blind spots, so what both see is more likely there.
LM is any causal language model with safetensors weights that transformers loads, for instance one that
`examples/train_target_lm.py` has made; the result is a folder that `load_scorer` takes.

LM may also be a classifier that this script made: the second command goes on with one on texts that Perspective scored.
`--fold 2/2` takes the second half of the texts, by their hashes, so that the other half can serve for something else.

Clean comments are also shown in part (half of them, cut to 5 to 40 words): what is part of a clean text is clean, and
generated text is short. Needs 20 minutes on two CPU cores with a model of 4 M parameters. Same data, base and seed give
the same weights on the same machine.

What it leaves out: resuming (the run is short), and figures on other collections (`examples/measure_scorer.py`).
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from calibfuse.scorers.continuation_files import Fold
from calibfuse.scorers.recipe import ScorerData, added_texts, gather
from calibfuse.scorers.training import LabelledTexts, area_under_curve
from calibfuse.training.mixed_precision import mixed_precision

WORDS = (5, 40)  # length of a part of a clean text


def shortened(data: LabelledTexts, draw: random.Random) -> list[str]:
    """The texts, half of the clean ones cut to a part."""
    texts = []
    for text, label in zip(data.texts, data.labels.tolist(), strict=True):
        words = text.split()
        if label < 0.1 and len(words) > WORDS[0] and draw.random() < 0.5:
            length = draw.randint(*WORDS)
            start = draw.randrange(max(1, len(words) - length + 1))
            text = " ".join(words[start : start + length])
        texts.append(text)
    return texts


def batches(lengths: list[int], tokens: int, draw: random.Random) -> list[list[int]]:
    """Indices in batches of about `tokens` tokens, of texts of similar length, in a random order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + draw.random() * 8)
    found: list[list[int]] = [[]]
    for i in order:
        if found[-1] and (len(found[-1]) + 1) * lengths[i] > tokens:
            found.append([])
        found[-1].append(i)
    draw.shuffle(found)
    return found


@torch.inference_mode()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: LabelledTexts, tokens: int) -> str:
    """Loss and area under the curve on held-out texts."""
    model.train(False)
    ids = tokenizer(held_out.texts, truncation=True)["input_ids"]
    logits = torch.zeros(len(ids))
    for batch in batches([len(row) for row in ids], 2 * tokens, random.Random(0)):
        padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(model.device)
        scores = model(**padded).logits.float()
        logits[batch] = (scores[:, 1] - scores[:, 0]).cpu()
    labels = torch.tensor(held_out.labels, dtype=torch.float32)
    likeness = np.corrcoef(logits.sigmoid().numpy(), held_out.labels)[0, 1]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    toxic = held_out.labels > 0.5
    found = (logits.numpy() > 0)[toxic].mean()
    wrong = (logits.numpy() > 0)[~toxic].mean()
    area = area_under_curve(logits.double().numpy(), toxic.astype(np.float64))
    return (
        f"held out {len(ids)}: loss {loss:.4f}, area under the curve {area:.4f}, correlation {likeness:.3f}, "
        f"toxic found {found:.3f}, false positives {wrong:.3f}"
    )


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--data", nargs="+", default=[], help="files of labelled texts")
    parser.add_argument("--where", nargs="*", default=[], metavar="KEY=VALUE", help="only such rows")
    parser.add_argument("--realtoxicityprompts", nargs="+", default=[], help="files of prompts and continuations")
    parser.add_argument("--fold", default="1/1", metavar="I/N", help="only part I of N of these (default: all)")
    parser.add_argument("--distrust-lowercase", action="store_true", help="leave out clean texts without a capital")
    parser.add_argument("--identity-terms", action="store_true", help="add sentences that make names of groups neutral")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--max-tokens", type=int, default=192, help="of a text")
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    draw = random.Random(args.seed)
    source = ScorerData(
        data=args.data,
        realtoxicityprompts=args.realtoxicityprompts,
        fold=Fold.parse(args.fold),
        where=dict(pair.split("=", 1) for pair in args.where),
        distrust_lowercase=args.distrust_lowercase,
        identity_terms=args.identity_terms,
        seed=args.seed,
    )
    labelled = gather(source).labelled
    order = np.random.default_rng(args.seed).permutation(len(labelled))
    held_out, data = labelled.take(order[: len(order) // 20]), labelled.take(order[len(order) // 20 :])
    added = added_texts(source, data)
    data = data if added is None else data + added

    tokenizer = AutoTokenizer.from_pretrained(args.base, model_max_length=args.max_tokens)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        args.base,
        num_labels=2,
        id2label={0: "clean", 1: "toxic"},
        label2id={"clean": 0, "toxic": 1},
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    ).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    labels, weights = torch.tensor(data.labels, dtype=torch.float32), torch.tensor(data.weights, dtype=torch.float32)
    done, total = 0.0, args.epochs
    for epoch in range(args.epochs):
        ids = tokenizer(shortened(data, draw), truncation=True)["input_ids"]
        plan = batches([len(row) for row in ids], args.batch_tokens, draw)
        model.train()
        progress = tqdm(plan, desc=f"epoch {epoch + 1} of {args.epochs}", mininterval=5)
        for batch in progress:
            share = done / total
            rate = min(1.0, share * 20) * 0.5 * (1 + math.cos(math.pi * share))  # a twentieth of the run warms up
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * max(rate, 1e-3)
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(args.device)
            with mixed_precision(model.device, "bf16"):
                scores = model(**padded).logits.float()
            each = torch.nn.functional.binary_cross_entropy_with_logits(
                scores[:, 1] - scores[:, 0], labels[batch].to(args.device), reduction="none"
            )
            loss = (each * weights[batch].to(args.device)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1 / len(plan)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        print(measure(model, tokenizer, held_out, args.batch_tokens))
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved {args.output}; use it with --scorer {args.output}")


if __name__ == "__main__":
    main()
