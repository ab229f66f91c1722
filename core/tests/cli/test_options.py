"""Options made from the dataclasses: flags, the YAML file, the environment, and who wins."""

import dataclasses
import json
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from dovetail.cli import options as cli_options
from dovetail.cli import section_options
from dovetail.cli.main import cli
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions, ServerOptions, arguments, flag, kinds
from dovetail.plugins.manifest import PlatformManifest
from dovetail.plugins.registry import Entry, Registry


def collect(*arguments, config=None, tmp_path=None, classes=(EngineOptions, ServerOptions), env=None):
    """Run a command that returns the options it receives."""

    @click.command()
    @cli_options.with_options(*classes)
    def command(*instances):
        return instances

    words = [str(word) for word in arguments]
    if config is not None:
        file = tmp_path / "options.yaml"
        file.write_text(config)
        words += ["--config", str(file)]
    result = CliRunner().invoke(command, words, standalone_mode=False, env={"DOVETAIL_API_KEY": None} | (env or {}))
    if result.exception is not None:
        raise result.exception
    return result.return_value


def test_defaults_are_the_dataclasses():
    assert collect() == (EngineOptions(), ServerOptions())


EXAMPLES = {int: 3, float: 1.5, str: "text", dict: {"method": "x"}, bool: None}
CHECKED = {
    "load_format": "dummy",
    "memory_fraction": 0.5,
    "max_num_batched_tokens": 100,
    "dtype": "float32",
    "scheduling_policy": "priority",
    "log_level": "debug",
}


@pytest.mark.parametrize("cls", [EngineOptions, ServerOptions])
def test_every_field_by_flag_and_by_yaml(cls, tmp_path):
    import json

    import yaml

    for field in dataclasses.fields(cls):
        kind = kinds(cls)[field.name]
        value = CHECKED.get(field.name, EXAMPLES[kind])
        if kind is bool:
            value = not field.default
            words = [flag(field.name) if value else f"--no-{flag(field.name)[2:]}"]
        elif field.name == "model":
            words = [value]
        else:
            words = [flag(field.name), json.dumps(value) if kind is dict else value]
        if field.name == "max_num_batched_tokens":
            words += ["--max-num-seqs", 2]
        (by_flag,) = collect(*words, classes=(cls,))
        assert getattr(by_flag, field.name) == value
        text = yaml.safe_dump({field.name: value, **({"max_num_seqs": 2} if len(words) == 4 else {})})
        (by_file,) = collect(config=text, tmp_path=tmp_path, classes=(cls,))
        assert by_file == by_flag, field.name


def test_flags_win_over_the_file(tmp_path):
    engine, server = collect(
        "--seed",
        5,
        "--no-enable-prefix-caching",
        config="seed: 4\nport: 9\nenable_prefix_caching: true",
        tmp_path=tmp_path,
    )
    assert (engine.seed, engine.enable_prefix_caching, server.port) == (5, False, 9)


def test_model_argument_wins_over_the_file(tmp_path):
    assert collect("a", config="model: b", tmp_path=tmp_path)[0].model == "a"
    assert collect(config="model: b", tmp_path=tmp_path)[0].model == "b"


def test_dashes_and_underscores_are_the_same_in_the_file(tmp_path):
    assert collect(config="max-num-seqs: 7", tmp_path=tmp_path)[0].max_num_seqs == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_num_seq: 7", r"unknown key 'max_num_seq'\. Did you mean 'max_num_seqs'\?"),
        ("seed: '7'", "seed is '7'; it must be a whole number"),
        ("seed: true", "seed is True; it must be a whole number"),
        ("seed: 1.5", "seed is 1.5; it must be a whole number"),
        ("kv_cache_memory: true", "kv_cache_memory is True; it must be a number"),
        ("enable_prefix_caching: 1", "enable_prefix_caching is 1; it must be true or false"),
        ("model: 7", "model is 7; it must be a string"),
        ("speculative_config: x", "speculative_config is 'x'; it must be a mapping"),
        ("seed: 1\nse-ed: 2", "unknown key 'se-ed'"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "gives max_num_seqs twice"),
        ("- a", "holds a list"),
        ("a: [", "is not YAML at line 1, column 5: expected the node content, but found '<stream end>'; write"),
        ("\x00", "is not YAML: special characters are not allowed; write"),
    ],
)
def test_wrong_file(text, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        collect(config=text, tmp_path=tmp_path)


def test_file_values_are_checked_like_flags(tmp_path):
    with pytest.raises(ConfigError, match="--dtype is 'int3'; choose one of"):
        collect(config="dtype: int3", tmp_path=tmp_path)


def test_one_file_serves_every_command(tmp_path):
    """Keys of the server are checked, and left aside by commands that run none."""
    text = "seed: 4\nport: 9\napi_key: secret"
    assert collect(config=text, tmp_path=tmp_path, classes=(EngineOptions,)) == (EngineOptions(seed=4),)
    with pytest.raises(ConfigError, match="port is 'x'; it must be a whole number"):
        collect(config="port: x", tmp_path=tmp_path, classes=(EngineOptions,))
    with pytest.raises(ConfigError, match=r"unknown key 'prot'\. Did you mean 'port'\?"):
        collect(config="prot: 9", tmp_path=tmp_path, classes=(EngineOptions,))


@pytest.mark.parametrize(
    ("cls", "name", "value", "expected"),
    [
        (EngineOptions, "max_num_seqs", "8", "--max-num-seqs is '8' (str); it must be a whole number."),
        (EngineOptions, "max_num_seqs", None, "--max-num-seqs is None (NoneType); it must be a whole number."),
        (EngineOptions, "block_size", True, "--block-size is True (bool); it must be a whole number."),
        (EngineOptions, "kv_cache_memory", "1", "--kv-cache-memory is '1' (str); it must be a number."),
        (EngineOptions, "allow_fallback", 1, "--allow-fallback is 1 (int); it must be true or false."),
        (EngineOptions, "platform", 7, "--platform is 7 (int); it must be a string."),
        (EngineOptions, "speculative_config", "x", "--speculative-config is 'x' (str); it must be a mapping."),
        (ServerOptions, "port", "80", "--port is '80' (str); it must be a whole number."),
    ],
)
def test_a_value_of_the_wrong_type_names_option_value_and_type(cls, name, value, expected):
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    assert str(caught.value) == expected


def test_whole_numbers_are_numbers():
    assert EngineOptions(kv_cache_memory=1).kv_cache_memory == 1


@pytest.mark.parametrize("text", ["", "seed: null", "revision: null"])
def test_empty_file_and_null_mean_the_default(text, tmp_path):
    assert collect(config=text, tmp_path=tmp_path)[0] == EngineOptions()


def test_whole_number_where_a_number_is_asked(tmp_path):
    value = collect(config="kv_cache_memory: 2", tmp_path=tmp_path)[0].kv_cache_memory
    assert (value, type(value)) == (2.0, float)


def test_wrong_range_names_the_flag():
    with pytest.raises(ConfigError, match="--max-num-seqs is 0"):
        collect("--max-num-seqs", 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("kv-cache-memory", value) for value in ("0", "nan", "inf")),
        *(("memory-fraction", value) for value in ("0", "nan", "1.01")),
        *(("max-body-mb", value) for value in ("0", "nan", "inf")),
        *(("drain-timeout", value) for value in ("-1", "nan", "inf")),
        ("max-waiting", "-1"),
    ],
)
def test_numbers_that_cannot_be_honoured(name, value):
    with pytest.raises(ConfigError, match=f"--{name} is"):
        collect(f"--{name}", value)


def test_the_kv_cache_has_one_size():
    with pytest.raises(ConfigError, match="--memory-fraction and --kv-cache-memory both size the KV cache"):
        collect("--memory-fraction", 0.5, "--kv-cache-memory", 1)


@pytest.mark.parametrize("key", ["", " ", "secret\n"])
def test_an_api_key_that_no_client_could_send_is_refused(key):
    with pytest.raises(ConfigError, match="DOVETAIL_API_KEY"):
        collect("--api-key", key)
    with pytest.raises(ConfigError, match="DOVETAIL_API_KEY"):
        collect(env={"DOVETAIL_API_KEY": key})


@pytest.mark.parametrize(("value", "expected"), [("{", "is not JSON"), ("[1]", "not an object")])
def test_wrong_json(value, expected):
    with pytest.raises(click.BadParameter, match=expected):
        collect("--speculative-config", value)


def test_api_key_from_the_environment_is_the_last_resort(tmp_path):
    environment = {"DOVETAIL_API_KEY": "from-env"}
    assert collect(env=environment)[1].api_key == "from-env"
    assert collect(config="api_key: from-file", tmp_path=tmp_path, env=environment)[1].api_key == "from-file"
    assert collect("--api-key", "from-flag", env=environment)[1].api_key == "from-flag"


def test_arguments_is_the_inverse():
    options = EngineOptions(
        model="m", seed=4, enable_prefix_caching=False, speculative_config={"method": "x", "n": 1}, kv_cache_memory=0.5
    )
    assert collect(*arguments(options), classes=(EngineOptions,)) == (options,)
    assert arguments(EngineOptions()) == []


def test_as_arguments_rebuilds_the_options():
    options = EngineOptions(model="m", seed=4)
    assert EngineOptions(**cli_options.as_arguments(options)) == options


def test_help_shows_defaults_and_choices():
    shown = " ".join(CliRunner().invoke(cli, ["serve", "--help"]).output.split())
    assert "[auto|bfloat16|float16|float32]" in shown
    assert "Most requests computed in one step. [default: 64]" in shown
    assert "--enable-prefix-caching / --no-enable-prefix-caching" in shown
    assert "[default: None]" not in shown


@pytest.fixture
def platforms(monkeypatch):
    """One platform with options of its own, and one without."""
    manifests = {
        "abacus": {"beads": 10, "colour": "red", "wire": 0.5, "fast": False, "frame": {}},
        "plain": {},
    }
    registered: Registry[PlatformManifest] = Registry(kind="platform")
    for name, defaults in manifests.items():
        manifest = PlatformManifest(
            name=name, summary="", device_type="cpu", dtypes=("float32",), attention=("a",), defaults=defaults
        )
        entry = Entry(manifest=manifest, target="module:Class", plugin=name, distribution="tests", version="0")
        registered.add(entry)
    found = SimpleNamespace(registries=SimpleNamespace(platforms=registered))
    monkeypatch.setattr(section_options.PluginHost, "discover", lambda self: found)


def given(*arguments):
    @click.command(cls=section_options.EngineCommand)
    @cli_options.with_options(EngineOptions)
    def command(options):
        click.echo(json.dumps([options.platform, options.platform_config and dict(options.platform_config)]))

    return CliRunner().invoke(command, arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), ["auto", None]),
        (("--abacus-beads", "7"), ["abacus", {"beads": 7}]),
        (("--abacus-colour=blue", "--platform", "abacus"), ["abacus", {"colour": "blue"}]),
        (("--abacus-wire", "2", "--abacus-fast"), ["abacus", {"wire": 2.0, "fast": True}]),
        (("--abacus-frame", '{"of": "oak"}'), ["abacus", {"frame": {"of": "oak"}}]),
        (
            ("--platform-config", '{"beads": 1, "wire": 3}', "--no-abacus-fast", "--abacus-beads", "2"),
            ["abacus", {"beads": 2, "wire": 3, "fast": False}],
        ),
    ],
)
def test_options_of_a_platform_are_options(platforms, arguments, expected):
    result = given(*arguments)
    assert json.loads(result.output) == expected, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--abacus-bead", "7"), "--abacus-beads"),
        (("--abacus-beads", "many"), "'many' is not a valid integer"),
        (("--abacus-frame", "{"), "'{' is not JSON"),
    ],
)
def test_wrong_options_of_a_platform(platforms, arguments, message):
    result = given(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("arguments", [("--model", "folder"), ("--model=folder", "--eager")])
def test_the_model_is_an_argument(platforms, arguments):
    result = given(*arguments)
    assert result.exit_code == 2
    assert "The model is no option, but an argument: " in result.output


def test_options_of_another_platform_than_the_one_asked_for(platforms):
    error = given("--abacus-beads", "7", "--platform", "plain").exception
    assert isinstance(error, ConfigError)
    assert "--abacus-beads is an option of platform 'abacus', and the platform is 'plain'" in str(error)


def test_help_shows_the_options_of_platforms(platforms):
    assert "--no-abacus-fast" in given("--help").output


def test_plugins_are_discovered_only_for_options_that_are_not_known(monkeypatch):
    monkeypatch.setattr(section_options.PluginHost, "discover", lambda self: pytest.fail("discovered"))
    assert json.loads(given("--dtype", "float32", "--no-eager", "some/model").output) == ["auto", None]
