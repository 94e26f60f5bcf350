"""Training settings: presets, TOML files, single settings, and what is refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pmm_edge.errors import ModelError, PmmError
from pmm_edge.runs import AboutRun, new_run_folder
from pmm_edge.trainer.config import DEFAULT_PRESET, PRESETS, TrainConfig, choose_config, read_run_config


def test_the_settings_can_be_listed_without_torch():
    code = "import sys, pmm_edge.trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["market1501", "dukemtmc-reid", "cuhk03-detected", "cuhk03-labeled"])
def test_the_papers_presets(name):
    config = choose_config(name)
    k = {"market1501": 3, "dukemtmc-reid": 6}.get(name, 8)
    assert (config.epochs, config.batch, config.images_per_identity, config.lr) == (400, 64, 4, 1e-3)
    assert (config.height, config.width, config.backbone, config.backbone_weights) == (384, 128, "resnet50", "imagenet")
    assert (config.mix_blocks, config.block_size, config.erase_size, config.weight_decay) == (k, (3, 2), 64, 5e-4)
    assert (config.schedule, config.method, config.mix) == ("paper", "pmm", "a-hard-mix")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_toml(tmp_path, name):
    path = tmp_path / "run.toml"
    path.write_text(PRESETS[name].to_toml())
    assert choose_config(config=path) == PRESETS[name] == choose_config(name) == choose_config(config=PRESETS[name])


def test_a_file_overrides_its_preset_and_settings_override_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "edge"\nepochs = 3\nweight_decay = 0\ndevice = 0\ncompile = true\n')
    config = choose_config(config=path, settings={"epochs": 5, "compile": False})
    expected = replace(PRESETS["edge"], epochs=5, weight_decay=0.0, device="0")
    assert config == expected and type(config.weight_decay) is float
    path.write_text("epochs = 3\n")
    assert choose_config(config=path) == replace(PRESETS[DEFAULT_PRESET], epochs=3)


def test_a_teacher_chooses_the_baseline_unless_a_method_is_given(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "edge"\nmethod = "pmm"\nteacher = ""\n')
    assert choose_config(config=path).method == "pmm"
    for base in ({"preset": "market1501"}, {"config": path}):
        config = choose_config(**base, settings={"teacher": Path("best.pt")})
        assert (config.method, config.teacher) == ("baseline", "best.pt")
    with pytest.raises(PmmError) as caught:
        choose_config(settings={"teacher": "best.pt", "method": "bdb"})
    assert "--method baseline" in caught.value.remedy
    for wrong in ({"mix": "cutout"}, {"mix": "cutmix"}, {"rpp": True}):
        with pytest.raises(PmmError) as caught:
            choose_config(settings={"teacher": "best.pt", **wrong})
        assert "--teacher" in caught.value.remedy and "--method" not in caught.value.remedy


@pytest.mark.parametrize("method", ["pcb", "cama"])
def test_a_method_with_an_embedding_size_of_its_own_ignores_that_of_the_preset(method):
    assert choose_config("edge", settings={"method": method}).embedding_size == 512
    assert choose_config(config=PRESETS["edge"], settings={"method": method}).embedding_size == 512
    with pytest.raises(PmmError) as caught:
        choose_config("edge", settings={"method": method, "embedding_size": 256})
    assert "--embedding-size" in caught.value.remedy


def test_settings_that_did_not_exist_when_a_run_started_are_defaults_and_not_those_of_todays_preset(tmp_path):
    folder, config = tmp_path / "run", replace(PRESETS["edge"], method="pmm", embedding_size=512)
    new_run_folder(AboutRun("edge", "data", "0"), folder)
    lines = config.to_toml().splitlines()
    (folder / "config.toml").write_text("\n".join(line for line in lines if not line.startswith("embedding_size")))
    assert PRESETS["edge"].embedding_size != 512 and read_run_config(folder) == config


@pytest.mark.parametrize(
    ("toml", "remedy"),
    [
        ("epoch = 3", "Did you mean 'epochs'"),
        ('epochs = "3"', "int"),
        ("epochs = 0", "1"),
        ("lr = 0.0", "positive"),
        ("batch = 15", "multiple of 2"),
        ("erase_size = 100", "80x32"),
        ('mix_block_size = "3"', "3x2"),
        ('mix_block_size = "99999x1"', "3x2"),
        ("height = 10001", "10000"),
        ("width = 10001", "10000"),
        ('preset = "quik"', "Did you mean 'quick'"),
        ('precision = "int8"', "auto, fp32, bf16, fp16"),
        ('mix = "cutmx"', "Did you mean 'cutmix'"),
        ('mix = "cutout"\nerase_size = 0', "--erase-size"),
        ('mix = "cutmix"\nmethod = "bdb"', "--method pmm"),
        ("rpp = true", "--method pcb"),
        ('rpp = true\nmethod = "pcb"\nepochs = 2', "3 or more"),
        ("embedding_size = 0", "1"),
        ('method = "pcb"\nembedding_size = 256', "--embedding-size"),
        ('method = "cama"\nembedding_size = 256', "--embedding-size"),
        ("epochs = [", "entry"),
        ("epochs = " + "9" * 5000, "entry"),
        ("epochs = " + "[" * 9999, "entry"),
        ("epochs = [1]", "int"),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path, toml, remedy):
    (tmp_path / "run.toml").write_text(toml)
    with pytest.raises(PmmError) as caught:
        choose_config(config=tmp_path / "run.toml")
    assert remedy in caught.value.remedy


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.toml").write_text("epochs = 1", "utf-16")
    for path in (tmp_path, tmp_path / "missing.toml", tmp_path / "text.toml"):
        with pytest.raises(PmmError) as caught:
            choose_config(config=path)
        assert str(path) in caught.value.problem


def test_k_follows_the_number_of_blocks_on_the_map():
    small = {"height": 192}
    assert choose_config("market1501", settings={**small, "width": 64}).mix_blocks == 1
    assert choose_config("cuhk03-labeled", settings=small).mix_blocks == 4
    assert choose_config("cuhk03-labeled", settings={**small, "mix_blocks": 5}).mix_blocks == 5


def test_a_preset_and_a_configuration_or_a_folder_without_a_run_are_refused(tmp_path):
    with pytest.raises(PmmError, match="both given"):
        choose_config("quick", TrainConfig())
    with pytest.raises(ModelError):
        read_run_config(tmp_path)
