from dataclasses import fields
from inspect import signature

import pytest

from pmm_edge.cli.train import train
from pmm_edge.errors import PmmError
from pmm_edge.trainer.config import PRESETS, TrainConfig, overridden, preset, read_assignments, read_config, resolved


def test_a_preset_survives_its_toml(tmp_path):
    for config in PRESETS.values():
        path = tmp_path / "run.toml"
        path.write_text(config.to_toml())
        assert read_config(path) == config


def test_a_file_overrides_the_preset_that_it_names(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "quick"\nepochs = 3\nweight_decay = 0\n')
    config = read_config(path)
    assert (config.epochs, config.weight_decay, config.backbone) == (3, 0.0, PRESETS["quick"].backbone)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("epoch = 3", "Did you mean 'epochs'"),
        ('epochs = "3"', "epochs is '3'. It must be of type int"),
        ("epochs = 1.5", "epochs is 1.5"),
        ("batch = 30", "multiple of 4"),
        ("epochs = [", "cannot be read as TOML"),
        ('preset = "quik"', "Did you mean 'quick'"),
        ('precision = "int8"', "auto, fp32, bf16, fp16"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path, toml, message):
    path = tmp_path / "run.toml"
    path.write_text(toml)
    with pytest.raises(PmmError, match=message):
        read_config(path)


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path):
    with pytest.raises(PmmError, match=rf"^{tmp_path} is a folder\. Name a TOML file, such as {tmp_path}/config.toml$"):
        read_config(tmp_path)
    with pytest.raises(PmmError, match=r"none\.toml does not exist"):
        read_config(tmp_path / "none.toml")
    path = tmp_path / "run.toml"
    path.write_bytes(b'init_from = "\xff"')
    with pytest.raises(PmmError, match=r"is no text in UTF-8, as TOML must be\. Save it as UTF-8$"):
        read_config(path)
    with pytest.raises(PmmError, match=r"^cannot read .*run.toml/x: Not a directory\. Name a TOML file"):
        read_config(path / "x")


def test_a_file_without_a_preset_has_the_default_one(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("epochs = 3\n")
    assert read_config(path) == resolved(preset("quick"), {"epochs": 3})


def test_a_value_of_a_wrong_type_is_refused():
    with pytest.raises(PmmError, match="must be of type int"):
        overridden(preset("quick"), {"epochs": True})


def test_assignments_are_toml_values_or_strings():
    values = read_assignments(["epochs=3", "ema=0.5", "compile=true", "mix_block_size=3x2", "init_from='1'"])
    assert values == {"epochs": 3, "ema": 0.5, "compile": True, "mix_block_size": "3x2", "init_from": "1"}
    with pytest.raises(PmmError, match=r"'epochs' sets nothing\. Write KEY=VALUE"):
        read_assignments(["epochs"])


def test_every_setting_has_a_flag():
    flags = {name.replace("compile_backbone", "compile") for name in signature(train).parameters}
    assert {field.name for field in fields(TrainConfig)} <= flags


def test_flags_undo_what_a_file_says(pmm, tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("compile = true\ndeterministic = true\nsync_batch_norm = true\n")
    undone = ["--no-compile", "--no-deterministic", "--no-sync-batch-norm", "--images-per-identity", 8]
    printed = pmm("train", "--config", path, *undone, "--print-config").stdout
    assert "= true" not in printed and "images_per_identity = 8" in printed


@pytest.mark.parametrize(
    ("preset_name", "size", "k"), [("market1501", (192, 64), 1), ("cuhk03-labeled", (192, 128), 4)]
)
def test_k_follows_the_number_of_blocks_on_the_map(preset_name, size, k):
    assert resolved(preset(preset_name), {"height": size[0], "width": size[1]}).mix_blocks == k
