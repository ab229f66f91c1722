"""What pages say of options, variables, metrics, messages and each other exists."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from dovetail.cli.bench.group import bench
from dovetail.cli.main import cli
from dovetail.cli.section_options import platform_options
from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo
from dovetail.deprecations import LEDGER
from dovetail.server.app import create_app
from dovetail.server.metrics import Metrics
from dovetail.server.protocol import _IGNORED, _UNSUPPORTED, ChatBody, CompletionBody, GenerationBody
from dovetail.testing import engine_config

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "core/src/dovetail"
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "core/README.md",
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("deploy/*/README.md"),
    ]
)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
FOREIGN = {"--extra-index-url", "--help", "--editable", "--no-deps", "--vllm", "--llama-cpp", "--index-url"}
FOREIGN |= {"--file", "--tag", "--privileged", "--net", "--volume", "--filename", "--target", "--build-context"}
"""Options of other programs (pip, docker, kubectl, the benchmark scripts), and click's own."""


def commands():
    context = click.Context(cli)
    yield cli
    for group, names in ((cli, cli.list_commands(context)), (bench, bench.list_commands(context))):
        yield from (group.get_command(context, name) for name in names)


def anchors(page):
    """The ids that a forge gives to headings."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"\w+://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_options_exist():
    options = [*(param for command in commands() for param in command.params), *platform_options()]
    known = {spelling for option in options for spelling in (*option.opts, *option.secondary_opts)} | FOREIGN
    for page in PAGES:
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+(?![\w-])", page.read_text())) - known
        assert not unknown, (page, unknown)


def test_variables_exist():
    import dovetail.env

    for page in PAGES:
        for variable in re.findall(r"\bDOVETAIL_[A-Z_]+", page.read_text()):
            assert f"``{variable}``" in (dovetail.env.__doc__ or ""), (page, variable)


def test_dotted_names_exist():
    for page in PAGES:
        for dotted in set(re.findall(r"\bdovetail(?:\.\w+)+", page.read_text())):
            parts = dotted.split(".")
            if dotted.startswith("dovetail.part") or parts[-1] in ("env", "yaml"):  # a log line; files in /etc
                continue
            found = import_module("dovetail")
            for i, part in enumerate(parts[1:], start=2):
                found = getattr(found, part) if hasattr(found, part) else import_module(".".join(parts[:i]))


def test_every_deprecation_is_listed():
    text = (ROOT / "docs/plugins/stability.md").read_text().partition("## Deprecations")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    ledger = [(entry.what, entry.instead, entry.since, entry.removed_in) for entry in LEDGER]
    assert [row for row in rows if "nothing at present" not in row and row[2] != "since"] == ledger


def test_files_of_the_source_exist():
    for page in PAGES:
        for name in re.findall(r"`(dovetail/[\w/]+\.py)`", page.read_text()):
            assert (SOURCE.parent / name).exists(), (page, name)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)[` ]", page.read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page, target)


def exported():
    metrics = Metrics(compat=True)
    info = ExecutorInfo(num_blocks=9, block_size=4, groups=())
    config: EngineConfig = engine_config()
    metrics.ready("a model", config, info)
    return {family.name: family for family in metrics.registry.collect()}


def test_every_metric_is_explained():
    text = (ROOT / "docs/metrics.md").read_text()
    rows = re.findall(r"^\| `((?:dovetail|vllm):\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert sorted(rows) == sorted((name, family.type) for name, family in exported().items())


def test_metrics_exist():
    names = set()
    for name, family in exported().items():
        suffixes = {"counter": ("", "_total"), "histogram": ("", "_bucket", "_sum", "_count")}
        names |= {name + suffix for suffix in suffixes.get(family.type, ("",))}
        for sample in family.samples:
            names.add(sample.name)
    for page in PAGES:
        unknown = set(re.findall(r"\b(?:dovetail|vllm):[a-z]\w+", page.read_text())) - names
        assert not unknown, (page, unknown)


def messages():
    """Every text of the core's source; values inside are NUL."""
    texts = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


@pytest.mark.parametrize(
    ("name", "part"),
    [("docs/operating.md", r"## Troubleshooting.*"), ("docs/plugins/README.md", r"## What can go .*?\n## ")],
)
def test_quoted_messages_are_in_the_source(name, part):
    (section,) = re.findall(part, (ROOT / name).read_text(), re.DOTALL)
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    cell = 0 if name.endswith("operating.md") else 1
    quoted = [quote for row in rows[1:] for quote in re.findall(r"`([^`]{12,}?)`", row[cell])]
    assert len(quoted) >= 7
    known = messages()
    for quote in quoted:
        parts = [part.strip() for part in quote.split("…") if part.strip(" …")]
        assert all(any(part in text.replace("\0", "…") for text in known) for part in parts), quote


def fields_of(text, title):
    section = text.partition(title)[2]
    table = section.partition("| field |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


def test_every_request_field_is_explained():
    text = (ROOT / "docs/api.md").read_text()
    both = set(GenerationBody.model_fields)
    assert fields_of(text, "## Fields of both") == both
    completion = set(CompletionBody.model_fields) - both | {"max_tokens"}
    assert fields_of(text, "Fields of `/v1/completions` alone") == completion
    assert fields_of(text, "Fields of `/v1/chat/completions` alone") == set(ChatBody.model_fields) - both


def test_refused_and_ignored_fields_are_listed():
    text = (ROOT / "docs/api.md").read_text()
    refused = text.partition("### Refused")[2].partition("### Ignored")[0]
    ignored = text.partition("### Ignored")[2].partition("## Responses")[0]
    named = set(re.findall(r"`(\w+)`", refused))
    assert named - {"tools", "tool_choice", "response_format"} == set(_UNSUPPORTED)
    assert set(re.findall(r"`(\w+)`", ignored)) == set(_IGNORED)


def test_every_route_is_listed():
    text = (ROOT / "docs/api.md").read_text()
    listed = dict(re.findall(r"^\| (?:GET|POST) \| `(/[\w/]*?(?:\{name\})?)` \| (.+) \|$", text, re.MULTILINE))

    class Unserved:
        class options:  # noqa: N801
            api_key = None

    routes = {route.path.replace(":path", "") for route in create_app(Unserved()).routes}
    assert set(listed) | {"/ping"} == routes


def test_error_codes_are_listed():
    text = (ROOT / "docs/api.md").read_text().partition("## Errors")[2]
    listed = set(re.findall(r"^\| \d+ \| `(\w+)` \|", text, re.MULTILINE))
    source = "\n".join(path.read_text() for path in [*(SOURCE / "server").glob("*.py"), SOURCE / "errors.py"])
    used = set(re.findall(r"code=\"(\w+)\"", source)) | set(re.findall(r"\d{3}: \"(\w+)\"", source))
    assert listed == used
