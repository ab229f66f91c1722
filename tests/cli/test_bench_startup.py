"""`dovetail bench startup` starts the real server, with the options it was given."""

import json

from dovetail.cli.main import run

SMALL = ["--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--num-threads", "1"]


def test_times_a_real_start(capsys):
    assert run(["bench", "startup", *SMALL, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert 0 < numbers["import_seconds"] < numbers["health_seconds"] < numbers["first_token_seconds"]


def test_server_that_cannot_start_is_shown_with_its_reason(capsys):
    assert run(["bench", "startup", *SMALL, "--attention", "nope"]) == 1
    message = capsys.readouterr().err
    assert "error: The server ended with exit code 2 before it was ready:" in message
    assert "No attention backend is named 'nope'" in message
