"""What mkdocs.yml makes a site of: the repository's documents, each at its own place.

README.md is the home page and docs/method.md is docs/method/. So every relative link that works on the repository's
page works in the site too, and no text exists twice. Files that a page links, such as figures and CSV files, come
along. A page api/MODULE.md of the navigation is made from the docstrings of that module.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
API_PAGE = """# {module}

::: {module}
"""
# One that is called as its file is: to griffe the file hides it.
API_NAMESAKE = """
::: {home}.{name}
    options: {{show_root_heading: true, show_root_toc_entry: true, show_root_full_path: false}}
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces mkdocs' own list, which has what lies in docs/ and no more."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    named = list(_pages(config.nav))
    modules = {page for page in named if page.startswith("api/")}
    documents = {page for page in named if page not in modules}
    documents |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    for page in sorted(documents | _linked(documents)):
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    for page in sorted(modules):
        files.append(File.generated(config, page, content=_api_page(Path(page).stem)))
    return files


def _pages(nav: list | dict | str) -> Iterator[str]:
    """The paths that a navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages(entry)


def _api_page(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    imports = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ImportFrom)]
    names = [(node.module, alias.name) for node in imports for alias in node.names]
    namesakes = [API_NAMESAKE.format(home=home, name=name) for home, name in names if home == f"{module}.{name}"]
    return API_PAGE.format(module=module) + "".join(namesakes)


def _linked(documents: set[str]) -> set[str]:
    """Files other than documents that they link, as paths from the root."""
    found = set()
    for document in documents:
        path = ROOT / document
        targets = [(path.parent / target).resolve() for target in LINK.findall(path.read_text())]
        found |= {target.relative_to(ROOT).as_posix() for target in targets if target.is_file()}
    return found - documents
