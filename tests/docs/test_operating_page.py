"""What the page on operating shows of a server's start is what one prints."""

import re
import shlex


def without_seconds(lines):
    return [re.sub(r"\d+\.\d\d s\b", "… s", line) for line in lines]


def test_what_runs(read_page, serve, tmp_path):
    section = read_page("docs/operating.md").text.partition("## What runs")[2]
    command, shown = section.partition("```console\n$ ")[2].partition("```")[0].split("\n", 1)
    with serve(shlex.split(command)[1:], tmp_path / "log", DOVETAIL_CACHE=str(tmp_path)) as served:
        pass
    printed = served.log.read_text().replace(str(tmp_path), "/home/you/.cache/dovetail")
    printed = printed.replace(served.url, "http://127.0.0.1:8000")
    lines = [line for line in printed.splitlines() if not line.startswith("INFO ")]
    assert without_seconds(lines) == without_seconds(shown.splitlines())
