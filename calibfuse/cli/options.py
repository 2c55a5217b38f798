"""The options of the commands, each defined once: name, type, help. A command picks those that it has.

An option that fills a field of a settings class takes default and help from that class (`Fields`). Earlier spellings
work for one more version, with a note on standard error.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = Path(__file__).parent.parent
_HUB = "PATH_OR_HUB"
SWITCH = {"action": "store_true"}
_COUNT = {"type": int, "metavar": "N"}
_SHARE = {"type": float, "metavar": "P"}
_METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
_ORACLE = "of a scorer as oracle: "

# Destination -> settings of argparse. "old": earlier spellings; "flag": where it is not the destination with dashes.
OPTIONS: dict[str, dict[str, Any]] = {
    # the target model
    "model": {
        "old": ("--target",),
        "metavar": _HUB,
        "help": "causal language model: folder, Hub id or .gguf file (default: the demo target)",
    },
    "gguf_file": {"metavar": "NAME", "help": "GGUF file in the folder or repository of --model"},
    "revision": {"help": "branch, tag or commit on the Hub"},
    "device": {"help": "cpu, cuda, cuda:1, mps (default: the best there is)"},
    "dtype": {
        "choices": ("auto", "float32", "bfloat16", "float16"),
        "default": "auto",
        "help": "auto: the checkpoint's own, but float32 on a CPU",
    },
    "local_files_only": SWITCH | {"help": "never touch the network"},
    "trust_remote_code": SWITCH | {"help": "run Python code that the model brings along"},
    # the calibrator
    "calibrator": {"metavar": _HUB, "help": "folder or Hub id (default: the bundled one)"},
    "alpha": {"type": float, "metavar": "A", "help": "strength; 0 is off (default: what the calibrator recommends)"},
    "mode": {"help": "contrast, geometric, value, embedding (default: what the calibrator recommends)"},
    # prompts
    "prompts": {"metavar": "FILE", "help": "prompts: .jsonl, .csv or .txt, also as .gz or .xz"},
    "prompt_count": _COUNT | {"default": 500, "help": "prompts drawn at random; 0: all"},
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
    "power": {"type": float, "default": 1.0, "help": _ORACLE + "C = 1 - toxicity^POWER"},
    "threshold": _SHARE | {"help": _ORACLE + "C = 1 where the toxicity is below, else 0"},
    "continuation_only": SWITCH | {"help": "show the oracle the continuation without its prompt"},
    # files
    "text_field": {"help": "key or column of the text (default: found by name)"},
    "output": {"metavar": "DIR", "help": "folder of the result; made when missing"},
    "resume": SWITCH | {"help": "go on with what is in --output"},
    "html": {"metavar": "FILE", "help": "write a page that needs no other file"},
    "json": SWITCH | {"help": "print JSON"},
    "mask": {
        "action": argparse.BooleanOptionalAction,
        "default": True,
        "old": ("--unmasked",),
        "help": "mask offensive words on the screen and in pages",
    },
    "quiet": SWITCH | {"help": "no progress bars"},
    "name": {"help": "name on the model card"},
    "license": {"help": "licence of the weights on the model card, e.g. apache-2.0"},
}


def add(target: argparse._ActionsContainer, *names: str, **changed: dict[str, Any]) -> None:
    """Add options of the table to a parser or a group.

    Args:
        target: the parser or group.
        *names: keys of OPTIONS.
        **changed: further keys, with settings that differ from the table's, or that it has not.
    """
    for name in [*names, *changed]:
        settings = OPTIONS.get(name, {}) | changed.get(name, {})
        old = settings.pop("old", ())
        flag = settings.pop("flag", f"--{name.replace('_', '-')}")
        shown = settings.get("default")
        if shown not in (None, []) and not isinstance(shown, bool) and "(default" not in settings["help"]:
            settings["help"] += " (default: %(default)s)"
        field = settings.pop("field", name)
        action = target.add_argument(flag, dest=name, **settings)
        action.__dict__["field"] = field  # for messages of the library, which name the field
        for spelling in old:
            is_off = isinstance(action, argparse.BooleanOptionalAction) and spelling.startswith(("--no-", "--un"))
            new = f"--no-{flag[2:]}" if is_off else flag
            _add_old(target, spelling, name, new, action)


def _add_old(target: argparse._ActionsContainer, spelling: str, name: str, new: str, of: argparse.Action) -> None:
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
    target.add_argument(spelling, dest=name, action=_OldSpelling, new=new, of=of, **hidden)


class _OldSpelling(argparse.Action):
    """Takes the earlier spelling of an option for the option, and says how it is spelled now."""

    def __init__(self, option_strings: Any, dest: str, *, new: str, of: argparse.Action, **settings: Any) -> None:  # noqa: ANN401
        self._new = new
        is_switch = of.nargs == 0
        nargs = 0 if is_switch else of.nargs
        kind: Any = of.type
        super().__init__(option_strings, dest, nargs=nargs, type=kind, choices=of.choices, **settings)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401
        note = f"{option_string} is now {self._new}; the old spelling goes in the next version"
        print(f"calibfuse: note: {note}", file=sys.stderr)
        if self.nargs == 0:
            values = not self._new.startswith("--no-")
        elif self.nargs == "*":
            values = [*getattr(namespace, self.dest, []), *values]
        setattr(namespace, self.dest, values)


def add_texts(parser: argparse.ArgumentParser, name: str, *, metavar: str, help: str, old: str) -> None:
    """Add any number of arguments without an option; `texts_of` gives them. `old`: an option that they had before."""
    words = parser.add_argument(name, nargs="*", metavar=metavar, help=help)
    new = f"{metavar} without an option"
    _add_old(parser, old, f"old_{name}", new, words)


def texts_of(args: argparse.Namespace, name: str) -> list[str]:
    """The arguments that `add_texts` added."""
    return [*getattr(args, name), *getattr(args, f"old_{name}", [])]


def add_model(parser: argparse.ArgumentParser, **changed: dict[str, Any]) -> None:
    """Add `--model` and what belongs to it."""
    names = ["model", "gguf_file", "revision", "device", "dtype", "local_files_only", "trust_remote_code"]
    group = parser.add_argument_group("target model")
    add(group, *(name for name in names if name not in changed), **changed)


def add_calibrator(parser: argparse.ArgumentParser) -> None:
    """Add `--calibrator`, `--alpha` and `--mode`."""
    add(parser.add_argument_group("calibrator"), "calibrator", "alpha", "mode")


class _Field(NamedTuple):
    """A field of a settings class, as its source tells it."""

    annotation: str
    default: Any
    help: str


class Fields:
    """Options that fill the fields of a settings class.

    Type, default and help are the class's own. They are read from its source: importing it would load torch, and
    `--help` must come at once. An option that is not given is None, so that the class's own default counts.

    Args:
        source: "package.module:Class".
        *names: fields whose option has the field's name.
        **flags: field -> name of its option, where that is another one.
    """

    def __init__(self, source: str, *names: str, **flags: str) -> None:
        self.source = source
        self.options = {name: name for name in names} | flags

    def add(self, target: argparse._ActionsContainer, shown: str | None = None, **changed: dict[str, Any]) -> None:
        """Add the options to a parser or a group.

        Args:
            target: the parser or group.
            shown: what the help names as default, where that is not the class's.
            **changed: settings that differ, by field.
        """
        known = _read_fields(self.source)
        for name, option in self.options.items():
            field = known[name]
            settings: dict[str, Any] = {"help": field.help, "field": name} | changed.get(name, {})
            default = settings.get("default", field.default)
            settings.setdefault("default", None)  # not that of another command's option with the same name
            kind = field.annotation.partition(" | ")[0]
            if kind == "bool":
                if field.default:
                    settings["action"] = argparse.BooleanOptionalAction
                elif "action" not in settings:
                    settings |= {"action": "store_const", "const": True}
            elif kind.startswith("tuple"):
                settings |= {"nargs": "+", "type": {"int": int, "str": str}[kind[6:9]]}
                default = " ".join(map(str, default))
            else:
                settings |= {"type": {"int": int, "float": float, "str": str}[kind]}
            if "choices" not in settings and kind in _METAVARS:
                settings.setdefault("metavar", _METAVARS[kind])
            if "(default" not in settings["help"] and (
                shown or (not isinstance(default, bool) and default not in (None, ""))
            ):
                settings["help"] += f" (default: {shown or default})"
            add(target, **{option: settings})

    def values(self, args: argparse.Namespace) -> dict[str, Any]:
        """Field -> value, of the options that were given."""
        found = {name: getattr(args, option) for name, option in self.options.items()}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if value is not None
        }


@cache
def _read_fields(source: str) -> dict[str, _Field]:
    """The fields of a settings class and of those that it inherits from, with the first sentence on each."""
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
    told = _told(ast.get_docstring(places[name]) or "")
    for node in places[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            comment = lines[node.lineno - 1].partition("  # ")[2]
            try:
                default = None if node.value is None else ast.literal_eval(node.value)
            except ValueError:
                default = None  # another settings class, or a value that is computed
            help_ = told.get(node.target.id, comment)
            shown = re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), help_).replace("%", "%%")
            found[node.target.id] = _Field(ast.unparse(node.annotation), default, shown)
    return found


def _told(docstring: str) -> dict[str, str]:
    """Field -> what the section Attributes says of it, up to the first full stop."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:\n")[2].splitlines():
        if not line.strip():
            break
        if not line.startswith("        "):  # not the rest of the field before
            name, _, line = line.strip().partition(": ")
        found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return {name: text.partition(". ")[0].rstrip(".") for name, text in found.items()}
