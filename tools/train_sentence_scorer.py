"""Fine-tune a small sentence encoder to a toxicity scorer that `--scorer FOLDER` takes.

    python tools/train_sentence_scorer.py --encoder all-MiniLM-L6-v2 --output FOLDER --layers 3 TRAIN.jsonl ... \
        --test TEST.jsonl

Files hold one object per line with `text`, `label` (0 to 1) and, in test files, `set`, the name that the AUC is
reported under. Only the last layers are trained: the output of the others is computed once and kept in half precision.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from calibfuse.scorers.labelled_files import read_labelled, read_rows
from calibfuse.scorers.training import area_under_curve

MAX_TOKENS = 64


class Frozen:
    """Hidden states of texts below the trained layers, in one flat tensor."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str], frozen_layers: int
    ) -> None:
        ids = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        self.lengths = torch.tensor([len(each) for each in ids])
        order = self.lengths.argsort().tolist()
        states: list[Tensor | None] = [None] * len(ids)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(order), 64):
                rows = order[start : start + 64]
                batch, mask = pad([torch.tensor(ids[row]) for row in rows])
                hidden = model.bert.embeddings(input_ids=batch)
                hidden = through(model.bert.encoder.layer[:frozen_layers], hidden, mask)
                for row, state in zip(rows, hidden, strict=True):
                    states[row] = state[: len(ids[row])].bfloat16()
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.long), self.lengths.cumsum(0)])
        self.states = torch.cat(states)

    def batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """States [rows, length, width] and mask of some texts."""
        return pad([self.states[self.offsets[row] : self.offsets[row + 1]] for row in rows])


def pad(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths; the mask is True at what is text."""
    lengths = torch.tensor([len(part) for part in parts])
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


def through(layers: torch.nn.ModuleList, hidden: Tensor, mask: Tensor) -> Tensor:
    """Run hidden states through some layers."""
    bias = torch.where(mask, 0.0, -1e4)[:, None, None, :].to(hidden.dtype)
    for layer in layers:
        output = layer(hidden, attention_mask=bias)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def logits(model: torch.nn.Module, hidden: Tensor, mask: Tensor, frozen_layers: int) -> Tensor:
    """What the trained layers and the classifier make of frozen states."""
    hidden = through(model.bert.encoder.layer[frozen_layers:], hidden, mask)
    return model.classifier(model.dropout(model.bert.pooler(hidden)))


def train(model: torch.nn.Module, data: Frozen, labels: Tensor, options: argparse.Namespace) -> None:
    """Fit the last layers."""
    frozen_layers = len(model.bert.encoder.layer) - options.layers
    trained = [*model.bert.encoder.layer[frozen_layers:].parameters(), *model.bert.pooler.parameters()]
    trained += list(model.classifier.parameters())
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.01)
    steps = options.epochs * (len(labels) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps + 1)
    model.train()
    step, began, losses = 0, time.monotonic(), []
    for _ in range(options.epochs):
        for rows in batches(data.lengths, options.batch_size):
            if step >= steps:
                break
            hidden, mask = data.batch(rows)
            with torch.autocast("cpu", torch.bfloat16):
                output = logits(model, hidden, mask, frozen_layers).float()
            loss = functional.binary_cross_entropy_with_logits(output[:, 1] - output[:, 0], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            losses.append(loss.item())
            if step % 100 == 0:
                mean = sum(losses[-100:]) / 100
                print(f"step {step}/{steps}, loss {mean:.4f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


def batches(lengths: Tensor, size: int) -> list[list[int]]:
    """Random batches of texts of similar length."""
    order = torch.randperm(len(lengths))
    pools = [pool[lengths[pool].argsort()] for pool in order.split(size * 50)]
    rows = [part.tolist() for pool in pools for part in pool.split(size) if len(part) == size]
    return [rows[place] for place in torch.randperm(len(rows)).tolist()]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="labelled texts to train on")
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a BERT-like sentence encoder")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--test", nargs="*", default=[], help="labelled texts to measure on, with `set`")
    parser.add_argument("--layers", type=int, default=3, help="how many of the last layers are trained")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--limit", type=int, default=None, help="use so many texts at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    labels_by_id = {0: "harmless", 1: "toxic"}
    model = AutoModelForSequenceClassification.from_pretrained(
        options.encoder, num_labels=2, id2label=labels_by_id, label2id={v: k for k, v in labels_by_id.items()}
    ).eval()
    frozen_layers = len(model.bert.encoder.layer) - options.layers
    texts = read_labelled(options.files)
    chosen = torch.randperm(len(texts.texts))[: options.limit].tolist()
    data = Frozen(model, tokenizer, [texts.texts[row] for row in chosen], frozen_layers)
    print(f"{len(chosen)} texts, {len(data.states)} tokens below the trained layers", flush=True)
    train(model, data, torch.tensor(texts.labels, dtype=torch.float32)[chosen], options)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    rows = [row for path in options.test for _, row in read_rows(Path(path))]
    found = defaultdict(list)
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            inputs = tokenizer(
                [r["text"] for r in part], truncation=True, max_length=128, padding=True, return_tensors="pt"
            )
            for row, value in zip(part, model(**inputs).logits.softmax(-1)[:, 1].tolist(), strict=True):
                found[row["set"]].append((row["label"], value))
    report = {}
    for name, pairs in found.items():
        labels, values = np.array(pairs).T
        report[name] = round(area_under_curve(values, labels > 0.5), 4)
    print(json.dumps(report))
    (options.output / "auc.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
