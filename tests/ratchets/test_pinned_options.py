"""The options, pinned: a new one, a renamed one or a lost one is a decision and changes this list."""

from dataclasses import fields

import click

from dovetail.cli.bench.group import bench
from dovetail.cli.main import cli
from dovetail.options import EngineOptions, ServerOptions


def names(text):
    return text.split()


ENGINE = names("""
    model revision tokenizer load_format dtype max_model_len max_num_seqs max_num_batched_tokens block_size
    kv_cache_memory memory_fraction kv_cache_dtype enable_prefix_caching enable_chunked_prefill async_scheduling
    scheduling_policy seed platform platform_config compile_cache eager attention quantization
    speculative_config num_threads allow_fallback
""")
SERVER = names("""
    host port served_model_name api_key chat_template max_body_mb max_waiting drain_timeout compat_metrics log_level
""")
RUN = ["config", *ENGINE, "log_level"]
SAMPLING = names("max_tokens temperature top_p top_k min_p stop")
WORKLOAD = names("input_len output_len vocab_size")

COMMANDS = {
    "serve": ["config", *ENGINE, *SERVER],
    "chat": ["url", "api_key", "model", "system", *SAMPLING],
    "generate": [*RUN, "prompts", "file", "n", *SAMPLING, "as_json"],
    "warmup": [*RUN, "export_cache"],
    "plugins": ["as_json"],
    "explain": [*RUN, "as_json"],
    "conformance": names("plugin kinds names form output"),
    "doctor": ["config", *ENGINE, *SERVER, "as_json"],
    "new": names("kind name path"),
    "plan": ["config", *ENGINE, "name", "as_json"],
    "bench throughput": [*RUN, "num_prompts", *WORKLOAD, "as_json"],
    "bench latency": [*RUN, "runs", *WORKLOAD, "as_json"],
    "bench serve": [*names("url api_key model num_prompts concurrency request_rate seed"), *WORKLOAD, "as_json"],
    "bench startup": [*RUN, "runs", "timeout", "as_json"],
}


def test_options_of_engine_and_server():
    assert [field.name for field in fields(EngineOptions)] == ENGINE
    assert [field.name for field in fields(ServerOptions)] == SERVER


def test_options_of_every_command():
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context) if name != "bench"}
    commands |= {f"bench {name}": bench.get_command(context, name) for name in bench.list_commands(context)}
    assert {name: sorted(p.name for p in command.params) for name, command in commands.items()} == {
        name: sorted(options) for name, options in COMMANDS.items()
    }


def test_global_options():
    assert sorted(p.name for p in cli.params) == ["disable_plugins", "plugins", "trace_hooks", "version"]
