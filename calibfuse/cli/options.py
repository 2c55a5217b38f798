"""The options of the commands, each defined once: name, type, help. A command picks those that it has.

An option that fills a field of a settings class takes type, default and help from that class (`Fields`).
"""

from __future__ import annotations

import argparse
import ast
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = Path(__file__).parent.parent
_HUB = "PATH_OR_HUB"
SWITCH = {"action": "store_true"}
FILES = {"nargs": "+", "default": [], "metavar": "FILE"}
_SHARE = {"type": float, "metavar": "P"}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_TYPES: dict[str, Any] = {"int": int, "float": float, "str": str}

# Destination -> settings of argparse.
OPTIONS: dict[str, dict[str, Any]] = {
    # the target model
    "model": {"metavar": _HUB, "help": "causal LM: folder, Hub id or .gguf file (default: the demo target)"},
    "device": {"help": "cpu, cuda, cuda:1, mps (default: the best there is)"},
    "dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "default": "auto",
        "help": "auto: the checkpoint's own, but float32 on a CPU",
    },
    "trust_remote_code": SWITCH | {"help": "run Python code that the model brings along"},
    # the calibrator
    "calibrator": {"metavar": _HUB, "help": "folder or Hub id (default: the bundled one)"},
    "alpha": {"type": float, "metavar": "A", "help": "strength; 0 is off (default: what the calibrator recommends)"},
    "mode": {"help": "contrast, geometric, value, embedding (default: what the calibrator recommends)"},
    "words": {"metavar": "FILE", "help": "lower these words, too: one a line, with or without a bias in nats"},
    "protect_names": {"metavar": "FILE", "help": "names that are to keep their probability, one a line"},
    # prompts
    "prompts": {"metavar": "FILE", "help": "prompts: .jsonl, .csv or .txt, also as .gz or .xz"},
    "prompt_count": {"type": int, "metavar": "N", "default": 500, "help": "prompts drawn at random; 0: all"},
    "max_prompt_toxicity": _SHARE | {"help": "only prompts below; 0.5: non-toxic ones"},
    "min_prompt_toxicity": _SHARE | {"help": "only prompts of at least this toxicity"},
    # decoding
    "seed": {"type": int, "default": 0, "help": "of all draws"},
    "greedy": SWITCH | {"help": "always the best token"},
    "batch_size": {"type": int, "metavar": "ROWS", "default": 64, "help": "rows at once"},
    # judgement of text
    "scorer": {"default": "bundled", "help": "of toxicity: bundled, a folder or Hub id, module:function"},
    "toxic_from": _SHARE | {"default": 0.5, "help": "toxic from this score on"},
    "oracle": {"metavar": "SPEC", "help": "of the constraint: bundled, a scorer, or module:function"},
    "power": {"type": float, "default": 1.0, "help": "of a scorer as oracle: C = 1 - toxicity^POWER"},
    "threshold": _SHARE | {"help": "of a scorer as oracle: C = 1 where the toxicity is below, else 0"},
    "continuation_only": SWITCH | {"help": "show the oracle the continuation without its prompt"},
    # files
    "text_field": {"help": "key or column of the text (default: found by name)"},
    "output": {"metavar": "DIR", "help": "folder of the result; made when missing"},
    "resume": SWITCH | {"help": "go on with what is in --output"},
    "json": SWITCH | {"help": "print JSON"},
    "mask": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "help": "mask offensive words on the screen and in pages",
    },
    "quiet": SWITCH | {"help": "no progress bars"},
    "name": {"help": "name on the model card"},
    "license": {"help": "licence of the weights on the model card, e.g. apache-2.0"},
}


def add(target: argparse._ActionsContainer, *names: str, **changed: dict[str, Any]) -> None:
    """Add options of the table to a parser or a group, and others with settings of their own."""
    for name in [*names, *changed]:
        settings = OPTIONS.get(name, {}) | changed.get(name, {})
        shown = settings.get("default")
        if shown not in (None, []) and not isinstance(shown, bool) and "(default" not in settings["help"]:
            settings["help"] += " (default: %(default)s)"
        field = settings.pop("field", name)
        action = target.add_argument(f"--{name.replace('_', '-')}", dest=name, **settings)
        action.__dict__["field"] = field  # for messages of the library, which name the field


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model` and what belongs to it."""
    add(parser.add_argument_group("target model"), "model", "device", "dtype", "trust_remote_code")


def add_calibrator(parser: argparse.ArgumentParser) -> None:
    """Add `--calibrator` and how it is used."""
    add(parser.add_argument_group("calibrator"), "calibrator", "alpha", "mode", "words", "protect_names")


class _Field(NamedTuple):
    """A field of a settings class, as its source tells it."""

    annotation: str
    default: Any
    help: str


class Fields:
    """Options that fill the fields of a settings class."""

    def __init__(self, source: str, *names: str, **flags: str) -> None:
        self.source = source
        self.options = {name: name for name in names} | flags

    def add(self, target: argparse._ActionsContainer, **changed: dict[str, Any]) -> None:
        """Add the options to a parser or a group, some with settings that differ."""
        known = _read_fields(self.source)
        for name, option in self.options.items():
            field = known[name]
            settings: dict[str, Any] = {"help": field.help, "field": name} | changed.get(name, {})
            default = settings.get("default", field.default)
            settings.setdefault("default", None)  # not that of another command's option with the same name
            kind = field.annotation.partition(" | ")[0]
            if kind == "bool" and field.default:
                settings["action"] = argparse.BooleanOptionalAction
            elif kind == "bool":
                settings |= {"action": "store_const", "const": True}
            elif kind.startswith("Sequence"):
                settings |= {"nargs": "+", "metavar": "FILE"}
                default = None
            else:
                if kind.startswith("tuple"):
                    kind, default, settings["nargs"] = kind[6:9], " ".join(map(str, default)), "+"
                settings["type"] = _TYPES[kind]
                if "choices" not in settings:
                    settings.setdefault("metavar", _METAVARS[kind])
            if "(default" not in settings["help"] and not isinstance(default, bool) and default not in (None, ""):
                settings["help"] += f" (default: {default})"
            add(target, **{option: settings})

    def values(self, args: argparse.Namespace) -> dict[str, Any]:
        """Field -> value, of the options that were given."""
        found = {name: getattr(args, option) for name, option in self.options.items()}
        given = {name: value for name, value in found.items() if value is not None}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@cache
def _read_fields(source: str) -> dict[str, _Field]:
    """The fields of a settings class and of those that it inherits from, each with its comment."""
    module, _, name = source.partition(":")
    text = (_PACKAGE.parent / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    places = {each.name: each for each in tree.body if isinstance(each, ast.ClassDef)}
    imported = {
        alias.name: f"{each.module}:{alias.name}"
        for each in tree.body
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
    }
    found: dict[str, _Field] = {}
    for base in places[name].bases:
        parent = ast.unparse(base)
        found |= _read_fields(f"{module}:{parent}" if parent in places else imported[parent])
    for node in places[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = lines[node.lineno - 1].partition("  # ")[2]
            try:
                default = None if node.value is None else ast.literal_eval(node.value)
            except ValueError:
                default = None  # another settings class, or a value that is computed
            shown = re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), comment).replace("%", "%%")
            found[node.target.id] = _Field(ast.unparse(node.annotation), default, shown)
    return found
