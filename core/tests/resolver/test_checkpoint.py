"""Where checkpoints lie."""

import json

import pytest

from dovetail import checkpoint
from dovetail.errors import ConfigError
from dovetail.options import EngineOptions
from dovetail.plugins.manifest import ModelManifest
from dovetail.plugins.registry import Entry, Registries


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"eos_token_id": 7}')
    return path


def test_local_folder(folder, monkeypatch):
    assert checkpoint.locate(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint.locate("~/model") == folder


def test_folder_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        checkpoint.locate(str(tmp_path))


def test_file_instead_of_folder(folder):
    with pytest.raises(ConfigError, match="is a file; name the checkpoint's folder"):
        checkpoint.locate(str(folder / "config.json"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c", "", "https://x"])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(ConfigError, match="no hub id"):
        checkpoint.locate(name)


@pytest.mark.parametrize("name", ["~nobody-of-this-name/model", "a" * 5000])
@pytest.mark.parametrize("locate", [checkpoint.locate, checkpoint.locate_tokenizer])
def test_path_that_cannot_be(locate, name):
    with pytest.raises(ConfigError, match=r"The path .* cannot be looked at"):
        locate(name)


def test_hub_id_is_downloaded(folder, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo, **kwargs):
        calls.append((repo, kwargs["revision"]))
        assert "*.safetensors" in kwargs["allow_patterns"]
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.locate("owner/model", "v1") == folder
    assert calls == [("owner/model", "v1")]


def test_hub_failure_names_the_model_and_the_cause(monkeypatch):
    import huggingface_hub

    def download(repo, **kwargs):
        raise OSError("404 Client Error\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    expected = r"hub model owner/model \(revision v1\) cannot be had: OSError: 404 Client Error\. Check the name"
    with pytest.raises(ConfigError, match=expected):
        checkpoint.locate("owner/model", "v1")


def test_unreadable_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        checkpoint.read_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        checkpoint.read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        checkpoint.read_config(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": 7}, (1, 2)),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        ({}, {"text_config": {"eos_token_id": 3}}, (3,)),
        (None, {}, ()),
    ],
)
def test_eos(folder, generation, config, expected):
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert checkpoint.eos_token_ids(folder, config) == expected


@pytest.mark.parametrize("value", ["2", [1, "x"], True, 1.5])
def test_eos_of_a_wrong_type(folder, value):
    with pytest.raises(ConfigError, match="must be a token id or a list of them"):
        checkpoint.eos_token_ids(folder, {"eos_token_id": value})


def demo_registries(tmp_path, monkeypatch, *demos):
    """Registries of families whose demos are package data of a made-up package."""
    package = tmp_path / "demopackage"
    for folder in ("small", "large"):
        (package / folder).mkdir(parents=True)
        (package / folder / "config.json").write_text("{}")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    registries = Registries()
    for name, demo, priority in demos:
        manifest = ModelManifest(name=name, summary="", architectures=(), demo=demo, priority=priority)
        registries.models.add(Entry(manifest=manifest, target="a:B", plugin="p", distribution="d", version="1"))
    return registries, package


def test_demo_of_highest_priority_when_no_model_is_named(tmp_path, monkeypatch):
    registries, package = demo_registries(
        tmp_path,
        monkeypatch,
        ("none", None, 9),
        ("a", "demopackage:small", 0),
        ("b", "demopackage:large", 1),
    )
    assert checkpoint.select(EngineOptions(), registries) == (package / "large", "large")


@pytest.mark.parametrize("demo", ["no_such_package:folder", ":folder"])
def test_demo_whose_package_is_not_there(tmp_path, monkeypatch, demo):
    registries, _ = demo_registries(tmp_path, monkeypatch, ("a", demo, 0))
    with pytest.raises(ConfigError, match=f"The demo model {demo} cannot be had"):
        checkpoint.select(EngineOptions(), registries)


def test_named_model_comes_before_the_demo(folder):
    assert checkpoint.select(EngineOptions(model=str(folder)), Registries()) == (folder, str(folder))


def test_no_model_and_no_demo():
    with pytest.raises(ConfigError, match="no installed plugin brings a demo model"):
        checkpoint.select(EngineOptions(), Registries())


def test_demo_that_is_missing_from_its_package(tmp_path, monkeypatch):
    registries, _ = demo_registries(tmp_path, monkeypatch, ("a", "demopackage:gone", 0))
    with pytest.raises(ConfigError, match="demo model demopackage:gone is missing"):
        checkpoint.select(EngineOptions(), registries)


def test_tokenizer_folder_needs_no_model(tmp_path):
    assert checkpoint.locate_tokenizer(str(tmp_path)) == tmp_path


def test_tokenizer_of_the_hub_comes_without_weights(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, **kwargs):
        asked.append((repo, kwargs["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.locate_tokenizer("owner/model") == tmp_path
    ((repo, patterns),) = asked
    assert repo == "owner/model"
    assert not any("safetensors" in pattern for pattern in patterns)


def test_tokenizer_that_is_nowhere():
    with pytest.raises(ConfigError, match="/no/such"):
        checkpoint.locate_tokenizer("/no/such/tokenizer")
