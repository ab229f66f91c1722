"""What generation_config.json recommends."""

from __future__ import annotations

import json

import pytest

from dovetail.engine.generation_config import recommended_params
from dovetail.errors import ConfigError


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_without_the_file_nothing_is_recommended(tmp_path):
    assert recommended_params(tmp_path) == {}


def test_known_fields_are_taken_and_others_passed_over(tmp_path):
    write(tmp_path, temperature=0.8, top_p=0.95, top_k=None, max_new_tokens=99, num_beams=4, do_sample=True)
    assert recommended_params(tmp_path) == {"temperature": 0.8, "top_p": 0.95, "max_tokens": 99}


def test_no_sampling_means_greedy(tmp_path):
    assert recommended_params(write(tmp_path, do_sample=False, temperature=0.7)) == {"temperature": 0.0}


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": "high"}])
def test_unusable_values_name_the_file(tmp_path, values):
    with pytest.raises(ConfigError, match=r"generation_config.json recommends unusable"):
        recommended_params(write(tmp_path, **values))
