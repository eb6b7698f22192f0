"""The documents keep their word: Python blocks run, commands are ones that their program accepts, no link is dead."""

import argparse
import ast
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dfs_engine import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
if not README.exists():
    pytest.skip("needs a checkout", allow_module_level=True)
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RESULTS.md", ROOT / "CONTRIBUTING.md"]
NEEDS_GPU = {ROOT / "docs/gpu.md"}  # its Python blocks do

PLAIN = {*sys.stdlib_module_names, "torch", "numpy", "dfs_engine"}  # what a plain install can import
PROGRAMS = ("dfs", "python", "torchrun", "make", "pip")
# Words that stand for something, where a program checks what.
PLACEHOLDERS = {"MODEL": "vgg7_64", "RECIPE": "digits_vgg7_dfs", "VARIANT": "dfs", "N": "2", "GPU": "0"}


class Block(NamedTuple):
    """What stands between two fences."""

    line: int
    """Of the opening fence, from 1."""
    language: str
    source: str
    before: str
    """The document's text since the block before."""


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def blocks_of(text: str) -> list[Block]:
    matches = list(FENCED.finditer(text))
    ends = [0, *(match.end() for match in matches)]
    return [
        Block(line_of(text, match.start()), match[1], match[2], text[end : match.start()])
        for match, end in zip(matches, ends, strict=False)
    ]


def commands_of(text: str) -> list[tuple[int, str]]:
    """(line, command) of every line in a shell block, and of every `command` between backticks in the text."""
    lines = []
    for block in blocks_of(text):
        if block.language in ("", "sh", "bash", "console"):
            source = re.sub(r"\\\n\s*", " ", block.source)
            lines += [(block.line + offset, line) for offset, line in enumerate(source.splitlines(), start=1)]
    prose = FENCED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    lines += [(line_of(text, match.start()), match[1]) for match in re.finditer(r"`([^`\n]+)`", prose)]
    first: dict[str, int] = {}
    for line, words in ((line, words) for line, text in sorted(lines) for words in split_commands(text)):
        if words[0] in PROGRAMS:
            first.setdefault(" ".join(words), line)
    return [(line, command) for command, line in first.items()]


def split_commands(line: str) -> list[list[str]]:
    """Each command of a line as words, quotes left as they are; without comment, prompt and environment variables."""
    line = re.sub(r"(^|\s)#.*$", "", line).removeprefix("$ ")
    commands = [re.sub(r"^\s*(?:[A-Z_]+=\S*\s+)*", "", part).split() for part in re.split(r"\s&&\s|;\s", line)]
    return [words for words in commands if words]


TEXTS = {path: path.read_text() for path in DOCUMENTS}
PYTHON = {path: [block for block in blocks_of(text) if block.language == "python"] for path, text in TEXTS.items()}
COMMANDS = [(path, *found) for path, text in TEXTS.items() for found in commands_of(text)]


def of_blocks(paths):
    """Parametrizes `path` and `block`: each Python block of these documents."""
    found = [(path, block) for path in paths for block in PYTHON[path]]
    return pytest.mark.parametrize(
        ("path", "block"), found, ids=[f"{path.name}-line{block.line}" for path, block in found]
    )


RUNNER = """
import json, linecache, sys, traceback

def no_network(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        raise ConnectionError(f"blocks have to run without network, got a connection to {arguments[1]}")

sys.addaudithook(no_network)
document, blocks, output = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3]
namespace, errors = {"__name__": "document"}, {}
for line, source in blocks:
    try:
        exec(compile("\\n" * line + source, document, "exec"), namespace)
    except BaseException:
        errors[line] = traceback.format_exc()
json.dump(errors, open(output, "w"))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of a document: the traceback of each Python block that fails, by its line. Blocks run in turn and share names."""

    @functools.cache
    def run(path):
        folder = tmp_path_factory.mktemp("document")
        (folder / "blocks.json").write_text(json.dumps([(block.line, block.source) for block in PYTHON[path]]))
        quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-c", RUNNER, str(path), "blocks.json", "errors.json"]
        done = subprocess.run(line, cwd=folder, env=os.environ | quiet, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return {int(line): error for line, error in json.loads((folder / "errors.json").read_text()).items()}

    return run


@of_blocks(path for path in DOCUMENTS if path not in NEEDS_GPU)
def test_python_block_runs(path, block, errors):
    error = errors(path).get(block.line, "")
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", error)
    if missing and missing[1] not in PLAIN:
        pytest.skip(f"needs {missing[1]}")
    assert not error, f"{path.name}, the block at line {block.line}:\n{error}"


@of_blocks(DOCUMENTS)
def test_python_block_says_what_it_needs(path, block):
    imported = set()
    for node in ast.walk(ast.parse(block.source)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported |= {name.split(".")[0] for name in names if name}
    earlier = "".join(other.before for other in PYTHON[path] if other.line <= block.line)
    for name in sorted(imported - PLAIN):
        assert re.search(rf"needs[^.]*\b{name}\b", earlier), (
            f"{path.name}, line {block.line}: the block imports {name}, which a plain install lacks. "
            f'Say so in the text before it: "(needs {name})".'
        )


class ReachedError(Exception):
    """The command line was accepted: the work would begin."""


def reached(*args, **kwargs):
    raise ReachedError


WORK = (
    "training.trainer.Trainer",
    "inference.evaluate.run",
    "inference.predict.run",
    "training.conflicts.run",
    "training.convert.run",
    "inference.export.run",
    "validate.run",
    "evaluation.info.run",
    "runtime.doctor.report",
    "experiments.compare.compare",
    "experiments.compare.merge",
    "experiments.sweep.compare",
    "benchmarks.gradients.run",
    "benchmarks.inference.run",
    "benchmarks.ops.run",
    "benchmarks.plot.run",
    "benchmarks.train.run",
    "benchmarks.tune.run",
)


def check_dfs(words, monkeypatch):
    """Runs the command up to its work; where the text only names it, such as `dfs bench`, up to its help."""
    for place in WORK:
        monkeypatch.setattr(f"dfs_engine.{place}", reached)
    monkeypatch.setattr("dfs_engine.models.weights.read_description", lambda path: {"data": {}})  # of no real run
    if all(re.fullmatch(r"[a-z]+", word) for word in words):
        words = [*words, "--help"]
    with pytest.raises((ReachedError, SystemExit)) as caught:
        cli.main(words)
    assert caught.type is ReachedError or caught.value.code in (0, None)


def check_python(words, monkeypatch):
    """`python FILE ...`, up to where it has parsed its arguments, and `python -m MODULE`."""
    if words[:2] == ["-m", "dfs_engine"]:
        return check_dfs(words[2:], monkeypatch)
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]), f"no module {words[1]}"
    elif words and words[0] != "-c":
        script = ROOT / words[0]
        assert script.is_file(), f"no file {words[0]}"
        if "argparse" in script.read_text():
            parse = argparse.ArgumentParser.parse_args
            monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *args: reached(parse(*args)))
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.setattr(sys, "path", ["", *sys.path])
            with pytest.raises(ReachedError):
                runpy.run_path(str(script), run_name="__main__")


def check_torchrun(words, monkeypatch):
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    check_python(["-m"] * given.module + [given.training_script, *given.training_script_args], monkeypatch)


def check_make(words, _):
    """Targets are the Makefile's. (`make --dry-run` would run what a recipe hands on to another make.)"""
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    unknown = {word for word in words if "=" not in word} - {target for rule in rules for target in rule.split()}
    assert not unknown, f"no target {', '.join(unknown)}"


def check_pip(words, _):
    """Extras are those of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:dfs_engine|\.)\[([\w,-]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= project.get("optional-dependencies", {}).keys()


@pytest.mark.parametrize(
    ("path", "line", "command"),
    COMMANDS,
    ids=[f"{path.name}-line{line}: {command}" for path, line, command in COMMANDS],
)
def test_command_is_accepted(path, line, command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command) if word not in ("...", "…")]
    try:
        globals()[f"check_{words[0]}"](words[1:], monkeypatch)
    except (Exception, SystemExit, pytest.fail.Exception) as error:
        said = capsys.readouterr().err.strip()
        pytest.fail(f"{path.name}, line {line}: `{command}` is not accepted: {said or error}", pytrace=False)


@pytest.mark.parametrize("command", ["dfs doctor", "dfs info MODEL"])
def test_quick_command_runs(command, capsys):
    assert command in [found for path, _, found in COMMANDS if path == README]
    assert cli.main([PLACEHOLDERS.get(word, word) for word in shlex.split(command)[1:]]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_link_is_dead(path):
    """Files of this repository, and headings in them."""
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", TEXTS[path]):
        linked = (path.parent / target).resolve() if target else path
        assert linked.is_file(), f"{path.name}: nothing at {target}"
        titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if heading else []
        anchors = {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert not heading or heading in anchors, f"{path.name}: no heading {heading} in {linked.name}"


def test_every_page_is_linked_from_readme():
    pages = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", TEXTS[README]))


def test_what_stands_in_a_readme_is_found():
    text = """
Text with `dfs doctor`, `model.eval()` and `make train`.

```sh
$ FLAG=1 dfs train --config a.yaml \\
    --epochs 3   # a comment with dfs in it
cd there && make test
```

| `dfs eval RUN` | "`python -m dfs_engine train ...`" |

```python
dfs = 1
```
"""
    found = [
        (2, "dfs doctor"),
        (2, "make train"),
        (5, "dfs train --config a.yaml --epochs 3"),
        (6, "make test"),
        (10, "dfs eval RUN"),
        (10, "python -m dfs_engine train ..."),
    ]
    assert sorted(commands_of(text)) == found
    assert [(block.line, block.source) for block in blocks_of(text) if block.language == "python"] == [
        (12, "dfs = 1\n")
    ]


@pytest.mark.parametrize(
    "command",
    [
        "dfs trian",
        "dfs train --epoch 3",
        "dfs train --config configs/no.yaml",
        "dfs bench ops --bata 1",
        "make tset",
        "python benchmarks/no.py",
        "python benchmarks/gpu_check.py --quikc",
        "torchrun --nproc_per_node 2 -m dfs_engine train --bata 1",
        'pip install "dfs_engine[no]"',
    ],
)
def test_a_wrong_command_is_not_accepted(command, monkeypatch, capsys):
    with pytest.raises(pytest.fail.Exception, match=re.escape(command)):
        test_command_is_accepted(README, 7, command, monkeypatch, capsys)


def test_files_are_there():
    """Paths between backticks, with wildcards too."""
    for path, text in TEXTS.items():
        for pattern in set(
            re.findall(r"`((?:configs|csrc|kernels|tests|dfs_engine|benchmarks)/[\w*./-]*[\w*])`", text)
        ):
            assert "NAME" in pattern or list(ROOT.glob(pattern)), f"{path.name}: nothing at {pattern}"
