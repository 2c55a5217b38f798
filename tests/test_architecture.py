"""The shape of the package, read from its syntax trees: imports run downwards, in no circle, on what is declared.

cli  ->  inspection | evaluation | finetune  ->  value  ->  processor | training  ->  embedding
     ->  calibrator | guides | fusion | scorers | generation  ->  loading  ->  guide
     ->  vocabulary | hub | html | ...  ->  errors
"""

import ast
import collections
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "calibfuse"

# A unit is a module or subpackage directly below calibfuse. An import between units goes to a lower row, never
# sideways. The root package only names what lies below, lazily.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("playground",),
    (
        "inspection",
        "evaluation",
        "finetune",
        "llama_cpp",
        "lm_eval",
        "vllm",
    ),  # inspection explains what a processor did; adapters of engines
    ("value",),
    ("processor", "training"),
    ("embedding", "bits_per_byte", "account"),
    ("calibrator", "guides", "fusion", "scorers", "generation"),
    ("loading", "prefix_cache"),
    ("guide",),
    ("vocabulary", "candidates", "hub", "textfiles", "html"),
    ("errors",),
)
LEVEL = {unit: -row for row, units in enumerate(LAYERS) for unit in units}

# What a module may import at its top, beside the standard library and the package itself.
CORE = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "tqdm"}
CODE_RUNNING_LOADERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Import:
    """One import: who imports what, and when it runs."""

    importer: str
    imported: str  # a module: submodules named in `from package import submodule` are resolved
    line: int
    late: bool  # inside a function
    typing_only: bool  # under `if TYPE_CHECKING`

    def __str__(self):
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports_of(name, tree):
    def walk(node, late, typing_only):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(name, alias.name, child.lineno, late, typing_only) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name}:{child.lineno}: imports are absolute in this package"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    if full == "calibfuse.__version__":  # a string that the root holds
                        continue
                    target = full if full in MODULES else child.module
                    yield Import(name, target, child.lineno, late, typing_only)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from walk(child, late, True)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, late or function, typing_only)

    yield from walk(tree, False, False)


IMPORTS = [each for name, tree in TREES.items() for each in imports_of(name, tree)]
OWN = [each for each in IMPORTS if each.imported.split(".")[0] == "calibfuse"]
FOREIGN = [
    each
    for each in IMPORTS
    if each.imported.split(".")[0] not in ({"calibfuse", "__future__"} | set(sys.stdlib_module_names))
]


def unit(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def show(imports):
    return "\n".join(map(str, imports))


def test_every_unit_has_its_place_in_the_layers():
    assert {unit(name) for name in MODULES} - {None} <= set(LEVEL), "add the new unit to LAYERS in this test"


def test_imports_between_units_run_downwards():
    upward = [
        each
        for each in OWN
        if unit(each.importer) is not None
        and unit(each.importer) != unit(each.imported)
        and (unit(each.imported) is None or LEVEL.get(unit(each.imported), 0) >= LEVEL[unit(each.importer)])
    ]
    assert not upward, show(upward)


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions count; those for type checkers alone do not."""
    edges = {name: set() for name in MODULES}
    for each in OWN:
        if not each.typing_only:
            edges[each.importer].add(each.imported)
    done, path = set(), []

    def visit(module):
        assert module not in path, "circle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(edges.get(module, ())):
                visit(target)
            path.pop()
            done.add(module)

    for module in MODULES:
        visit(module)


def test_modules_import_at_their_top_only_what_every_installation_has():
    extra = [
        each
        for each in FOREIGN
        if not each.late and not each.typing_only
        if each.imported.split(".")[0] not in CORE | {unit(each.importer)}  # an adapter has its engine's name
    ]
    assert not extra, show(extra) + "\nimport an optional package inside the function that needs it"


def test_every_import_is_declared():
    """Each third-party package is a requirement of the project or of one of its extras."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    declared = {re.match(r"[\w.-]+", each)[0].lower().replace("-", "_") for each in requirements}
    declared = {{"scikit_learn": "sklearn"}.get(name, name) for name in declared}
    missing = [each for each in FOREIGN if each.imported.split(".")[0].lower() not in declared]
    assert not missing, show(missing)
    core = {re.match(r"[\w.-]+", each)[0].replace("-", "_") for each in project["dependencies"]}
    assert core == CORE


def test_no_folder_holds_more_than_fourteen_modules():
    counts = collections.Counter(path.parent.relative_to(PACKAGE).as_posix() for path in MODULES.values())
    assert not {folder: count for folder, count in counts.items() if count > 14}


@pytest.mark.parametrize("name", [name for name in MODULES if unit(name) in ("cli", "__main__", None)])
def test_the_command_line_imports_nothing_heavy_at_its_top(name):
    heavy = [
        each
        for each in IMPORTS
        if each.importer == name and not each.late and not each.typing_only
        if each in FOREIGN or (each in OWN and unit(each.imported) not in ("cli", "errors", None))
        # strings, files and settings alone, no library
        if each.imported.removeprefix("calibfuse.") not in ("generation.decoding", "textfiles")
    ]
    assert not heavy, show(heavy)


def test_the_errors_import_nothing():
    assert not [each for each in IMPORTS if each.importer == "calibfuse.errors"]


def test_nothing_can_load_code_from_a_file():
    imported = [each for each in IMPORTS if each.imported.split(".")[0] in CODE_RUNNING_LOADERS]
    assert not imported, show(imported)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.jit.load"):
                pytest.fail(f"{name}:{node.lineno} uses {ast.unparse(node)}; weights are safetensors only")


def test_every_module_says_what_it_is_for():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_public_names_resolve_and_are_complete():
    import calibfuse

    for name in calibfuse.__all__:
        assert getattr(calibfuse, name) is not None
    errors = {node.name for node in TREES["calibfuse.errors"].body if isinstance(node, ast.ClassDef)}
    assert errors <= set(calibfuse.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = calibfuse.nonsense
