"""The reference of the API: built without a warning, with words on every public name, and examples that run."""

import doctest
import html
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from conftest import ROOT

import qwen3core
from qwen3core.weights.find import find

CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
[COMMAND] = re.findall(r"^    (python -m pdoc .*)$", CONTRIBUTING, re.MULTILINE)
NO_EXAMPLES = ("qwen3core.kernels", "qwen3core.weights.tiny_recipe", "qwen3core.__main__")
"""Modules that are not imported here: they need triton, or data, or run the command."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of every module, by the module's name, built by the command of CONTRIBUTING.md."""
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("reference")
    command = COMMAND.replace("python", sys.executable, 1).replace("-o reference ", f"-o {folder} ")
    assert command.count(str(folder)) == 1
    run = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "Warn" not in run.stderr
    files = {path: path.relative_to(folder).with_suffix("").parts for path in folder.rglob("*.html")}
    return {".".join(parts): path.read_text("utf-8") for path, parts in files.items() if parts != ("index",)}


def test_pages_hold_no_text_that_was_to_be_code(pages):
    assert {"qwen3core", "qwen3core.hooks", "qwen3core.profiling", "qwen3core.training"} <= set(pages)
    for module, page in pages.items():
        texts = re.findall(r'<div class="docstring">(.*?)</div>\n', page, re.DOTALL)
        assert texts, module
        for text in texts:
            prose = html.unescape(re.sub(r"<(pre|code)>.*?</\1>", "", text, flags=re.DOTALL))
            assert not re.search("`|>>>|:param", prose), (module, prose)


def test_every_public_name_is_documented(pages):
    doc = pytest.importorskip("pdoc.doc")
    missing = [name for module in pages for name in undocumented(doc, doc.Module(importlib.import_module(module)))]
    assert missing == []


def undocumented(doc: Any, parent: Any) -> Iterator[str]:
    """Public functions, classes, methods, fields and constants without a docstring or a line of ``Args:``."""
    arguments = [
        name for names in re.findall(r"^ +([\w, ]+):", parent.docstring, re.MULTILINE) for name in names.split(", ")
    ]
    for member in parent.own_members if isinstance(parent, doc.Class) else parent.members.values():
        value = member.default_value if isinstance(member, doc.Variable) else None
        if member.name.startswith("_") or isinstance(member, doc.Module) or isinstance(value, TypeVar):
            continue
        if isinstance(member, doc.Variable) and not member.taken_from[0].startswith("qwen3core"):
            continue  # a name for a type, which is documented where it is given
        if not member.docstring and member.name not in arguments:
            yield member.fullname
        if isinstance(member, doc.Class):
            yield from undocumented(doc, member)


def documented_modules() -> Iterator[str]:
    """Names of the modules that have examples."""
    for module in pkgutil.walk_packages(qwen3core.__path__, "qwen3core."):
        if not module.name.startswith(NO_EXAMPLES):
            source = inspect.getsource(importlib.import_module(module.name))
            if ">>>" in source:
                yield module.name


@pytest.mark.parametrize("name", qwen3core.__all__)
def test_every_name_of_the_package_has_an_example(name):
    assert ">>>" in getattr(qwen3core, name).__doc__


@pytest.mark.parametrize("module", list(documented_modules()))
def test_examples_run(module):
    """With the module's names, the package's, and a few more."""
    namespace = vars(importlib.import_module(module))
    names = {name: getattr(qwen3core, name) for name in qwen3core.__all__}
    names |= {"find": find, "TemporaryDirectory": TemporaryDirectory}
    found = doctest.DocTestFinder().find(sys.modules[module], globs=namespace | names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    results = [runner.run(test) for test in found]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0
