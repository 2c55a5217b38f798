"""Every program in tools/ loads with the package as it is, says what it does, and stands in the README beside it."""

import importlib.util
import sys

import pytest
from conftest import REPOSITORY

PROGRAMS = sorted((REPOSITORY / "tools").glob("*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_tool_shows_its_help(path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look their module up here
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_the_readme_lists_every_tool():
    text = (REPOSITORY / "tools" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in PROGRAMS if f"`{path.name}`" not in text] == []
