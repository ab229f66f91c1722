"""``dovetail serve`` over the fake engine: ``python fake_server.py '{"engine": {...}, "server": {...}}'``."""

from __future__ import annotations

import json
import sys

from dovetail.cli import log
from dovetail.errors import DovetailError
from dovetail.options import EngineOptions, ServerOptions, parse
from dovetail.server.main import run

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    server = parse(ServerOptions, options["server"])
    log.set_up(server.log_level)
    try:
        code = run(parse(EngineOptions, options["engine"]), server, engine_factory="fake_engine:build")
    except DovetailError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
