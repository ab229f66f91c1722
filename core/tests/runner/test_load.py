"""Importing resolved parts."""

from __future__ import annotations

import pytest

from dovetail.config import Selection
from dovetail.errors import PluginLoadError
from dovetail.runner.load import load_selection


def part(target):
    return Selection(name="toy", target=target, distribution="dovetail-toy", version="1.2", why="", plugin="games")


def test_load():
    assert load_selection(part("dovetail.config:Selection")) is Selection


@pytest.mark.parametrize("target", ["no_such_module:X", "dovetail.config:NoSuchClass"])
def test_failure_names_the_part_and_its_distribution(target):
    with pytest.raises(PluginLoadError, match=rf"'toy' of plugin 'games' \(dovetail-toy 1\.2\) cannot .* {target}"):
        load_selection(part(target))
