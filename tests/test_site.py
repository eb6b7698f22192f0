"""The site that `make docs` builds: it has every document and every public name, and asks nothing of the network."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "mkdocs.yml"
if not CONFIG.exists():
    pytest.skip("needs a checkout", allow_module_level=True)
NAV = re.findall(r": (\S+\.md)$", CONFIG.read_text(), re.MULTILINE)
MODULES = [Path(page).stem for page in NAV if page.startswith("api/")]


BUILD = """
import sys
from mkdocs.__main__ import cli

def no_network(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise ConnectionError(f"the site has to be built without network, got {event} {arguments}")

sys.addaudithook(no_network)
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-c", BUILD, "build", "--strict", "--config-file", CONFIG, "--site-dir", folder]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def page(site, source):
    """The HTML of a document, by its path in the repository."""
    name = re.sub(r"(^|/)README$", r"\1", source.removesuffix(".md"))
    return (site / name / "index.html").read_text()


def test_every_document_is_in_the_navigation():
    documents = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert documents | {"README.md", "benchmarks/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"} == {
        name for name in NAV if not name.startswith("api/")
    }
    assert len(NAV) == len(set(NAV))


def test_strict_build_has_each_page_with_its_title(site):
    for name in NAV:
        assert re.search(r"<h1[ >]", page(site, name)), name


def test_files_that_a_document_links_come_along(site):
    for document in [name for name in NAV if not name.startswith("api/")]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", (ROOT / document).read_text()):
            linked = (ROOT / document).parent.joinpath(target).resolve().relative_to(ROOT)
            if linked.suffix != ".md":
                assert (site / linked).read_bytes() == (ROOT / linked).read_bytes()


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_its_page(site, module):
    shown = re.findall(r'<h[1-6] id="([\w.]+)"', page(site, f"api/{module}.md"))
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [name for name, value in vars(loaded).items() if getattr(value, "__module__", None) == module]
    for name in names:
        value = getattr(loaded, name)
        if (inspect.isclass(value) or inspect.isfunction(value)) and not name.startswith("_"):
            assert any(heading in (f"{module}.{name}", f"{module}.{name}.{name}") for heading in shown), name


def test_no_page_loads_anything_from_elsewhere(site):
    """Links may lead anywhere. Scripts, styles, fonts and pictures are the site's own."""
    loading = re.compile(r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)="((?:https?:)?//[^"]*)\"""")
    for path in site.rglob("*.html"):
        text = path.read_text()
        assert not loading.findall(text), path.relative_to(site)
        assert 'class="mermaid"' not in text, "the theme would load mermaid's script from a CDN"
    for path in site.rglob("*.css"):
        assert not re.search(r"""url\(['"]?(https?:)?//""", path.read_text()), path.relative_to(site)
