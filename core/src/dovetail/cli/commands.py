"""The core's commands, as a table: starting the program imports none of them."""

from __future__ import annotations

COMMANDS = {
    "serve": ("dovetail.cli.serve:serve", "Serve a model over the OpenAI-compatible HTTP API."),
    "chat": ("dovetail.cli.chat:chat", "Talk to a running server."),
    "generate": ("dovetail.cli.generate:generate", "Complete prompts without a server."),
    "bench": (
        "dovetail.cli.bench.group:bench",
        "Measure throughput, latency, a running server, or start-up.",
    ),
    "warmup": ("dovetail.cli.warmup:warmup", "Compile what a model needs, for later starts, and exit."),
    "plugins": ("dovetail.cli.plugins:plugins", "List installed plugins and what they provide."),
    "explain": ("dovetail.cli.explain:explain", "Show what would run a model, and why."),
    "doctor": ("dovetail.cli.doctor.command:doctor", "Check whether this machine can serve, and say what to do."),
    "conformance": (
        "dovetail.cli.conformance:conformance",
        "Run the conformance suites of everything that an installed plugin registers.",
    ),
    "new": ("dovetail.cli.new:new", "Write a plugin package that runs, to start from."),
}
"""By name: ``"module:attribute"``, and the line in ``dovetail --help``."""
