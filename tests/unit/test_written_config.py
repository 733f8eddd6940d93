"""A written configuration file gives the same run by itself; a run keeps its own, and its earlier ones."""

from dataclasses import fields
from pathlib import Path

import pytest

from megatron.config.command_line import parse, resolve
from megatron.config.declaration import as_given, in_words
from megatron.config.reading.presets import PRESETS
from megatron.config.telling.as_toml import as_toml
from megatron.errors import ConfigError
from megatron.train.setup.configuration import keep_configuration
from pretrain_tape import main


def config_of(*argv):
    return parse([str(word) for word in argv])[0]


WRITTEN = [*(f"--preset {name}" for name in PRESETS), "--preset demo --recompute-granularity full",
           "--preset demo --use-distributed-optimizer --ema 0.999",
           "--preset tape --train-samples 9000 --fp16 --no-compile",
           "--preset tape --position-embedding-type rope --window-size 3 5 --mask-prob 0.3 0.15 100",
           "--preset demo --optimizer adam --lr-decay-style WSD --lr-wsd-decay-iters 10 --local-rank 0",
           "--preset demo --weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 1e-7",
           "--preset demo --swiglu --no-squared-relu --num-query-groups 2 --rampup-batch-size 4 4 8 --train-samples 64"]


@pytest.mark.parametrize("flags", WRITTEN)
def test_what_is_written_gives_the_same_configuration_by_itself(flags, tmp_path, capsys):
    file = str(tmp_path / "written.toml")
    assert main([*flags.split(), "--write-config", file]) == 0
    assert capsys.readouterr() == ("", "")
    assert config_of("--config", file, *(["--local-rank", "0"] if "local-rank" in flags else [])) == config_of(
        *flags.split())
    assert max(map(len, Path(file).read_text().splitlines())) <= 120


def test_a_refusal_says_a_value_as_the_command_line_takes_it():
    model = config_of("--preset", "demo", "--window-size", "3", "5", "--no-bias-gelu-fusion").model
    said = {item.name: as_given(item, in_words(item, getattr(model, item.name))) for item in fields(model)}
    assert [said[name] for name in ("window_size", "bias_gelu_fusion", "qk_layernorm", "swiglu")] == [
        "--window-size 3 5", "--no-bias-gelu-fusion", "--qk-layernorm", "--no-swiglu"]
    words = [word for text in said.values() if not text.startswith("no --") for word in text.split()]
    assert config_of("--preset", "demo", *words).model == model


@pytest.mark.parametrize("text", ['a "b" \\c', "tab\there", "é–漢", "line\nfeed", "\x7f\x01", "#=[x]", "C:\\new\\run"])
def test_paths_come_through_a_file_as_they_are(text, tmp_path):
    file = str(tmp_path / "written.toml")
    flags = ["--preset", "demo", "--save", text, "--data-path", "0.5", text, "0.5", "b"]
    assert main([*flags, "--write-config", file]) == 0
    assert config_of("--config", file) == config_of(*flags)


def test_what_follows_from_other_flags_follows_them_in_a_written_file(tmp_path):
    file = str(tmp_path / "written.toml")
    main(["--preset", "demo", "--write-config", file])
    assert "# ffn-hidden-size = 512 " in Path(file).read_text()
    model = config_of("--config", file, "--hidden-size", "256").model
    assert (model.ffn_hidden_size, model.kv_channels) == (1024, 64)


def test_a_written_configuration_can_be_printed(capsys):
    assert main(["--preset", "demo", "--lr", "2e-3", "--write-config", "-"]) == 0
    text = capsys.readouterr().out
    assert "\n[schedule]\nlr = 0.002 " in text
    assert "local-rank" not in text and text.startswith("# Flags of pretrain_tape.py: preset demo, flags.")


def test_a_configuration_is_not_written_where_it_cannot_be(tmp_path, capsys):
    (tmp_path / "a.toml").mkdir()
    (tmp_path / "mine.toml").write_text("# edited\n")
    for flags, message in ((["--write-config", f"{tmp_path}/a.yaml"], "let its name end in .toml"),
                           (["--write-config", ""], "let its name end in .toml"),
                           (["--write-config", f"{tmp_path}/a.toml"], "is there already"),
                           (["--write-config", f"{tmp_path}/mine.toml"], "mine.toml is there already; give another"),
                           (["--write-config", f"{tmp_path}/no/b.toml"], "cannot be written (No such file"),
                           (["--write-config", f"{tmp_path}/b.toml", "--save", "\udce9"], "cannot hold --save")):
        assert main(["--preset", "demo", *flags]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not (tmp_path / "b.toml").exists() and (tmp_path / "mine.toml").read_text() == "# edited\n"
    with pytest.raises(ConfigError, match="--write-config x.toml is of pretrain_tape.py alone"):
        config_of("--preset", "demo", "--write-config", "x.toml")


def kept(folder, iteration, *flags):
    keep_configuration(resolve(["--preset", "demo", "--save", str(folder), *flags]), iteration)


def test_a_run_keeps_its_configuration_and_what_differs_from_the_preset(tmp_path):
    kept(tmp_path, 0, "--hidden-size", "96", "--no-qk-layernorm", "--local-rank", "0")
    assert config_of("--config", tmp_path / "config.toml") == config_of(
        "--preset", "demo", "--save", tmp_path, "--hidden-size", 96, "--no-qk-layernorm")
    changes = (tmp_path / "config_changes.txt").read_text().splitlines()
    assert changes[0] == "from iteration 0 on: preset demo, flags"
    assert [line.split() for line in changes[1:4]] == [
        ["--hidden-size", "96", "(preset:", "128)"], ["--qk-layernorm", "off", "(preset:", "on)"],
        ["--save", str(tmp_path), "(preset:", "none)"]]


def test_a_run_that_goes_on_keeps_its_earlier_configurations(tmp_path):
    kept(tmp_path, 0)
    first = (tmp_path / "config.toml").read_text()
    kept(tmp_path, 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "config_changes.txt"]
    kept(tmp_path, 200, "--lr", "5e-4")
    kept(tmp_path, 200, "--train-samples", "8000")
    assert (tmp_path / "config-1.toml").read_text() == first
    assert config_of("--config", tmp_path / "config-2.toml").schedule.lr == 5e-4
    assert config_of("--config", tmp_path / "config.toml").training.train_samples == 8000
    changes = [line.split() for line in (tmp_path / "config_changes.txt").read_text().split("\n\n")[1].splitlines()]
    assert " ".join(changes[0]) == "from iteration 200 on, in place of what config-1.toml has: preset demo, flags"
    assert changes[1:] == [["--lr", "0.0005", "(before:", "0.001)"]]


def test_a_second_start_with_a_flag_that_has_no_effect_records_no_change(tmp_path):
    for iteration in (0, 100):
        kept(tmp_path, iteration, "--max-position-embeddings", "256")  # the preset's positions are rotary
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "config_changes.txt"]
    assert "--max-position-embeddings" not in (tmp_path / "config_changes.txt").read_text()


def test_what_a_checkpoint_says_of_what_follows_is_no_other_configuration():
    flags = "--hidden-size 64 --num-attention-heads 4 --lr 1 --batch-size 1 --train-iters 9 --seq-length 8".split()
    first = resolve(flags)
    again = resolve(flags, {name: value for name, value in vars(first.config.model).items() if name != "hidden_size"})
    assert (again.plain, again.config) == (first.plain, first.config)
    wider = resolve(flags, {"ffn_hidden_size": 300, "kv_channels": 16, "num_layers": 3})
    assert (wider.plain.model.ffn_hidden_size, wider.plain.model.kv_channels) == (300, None)
    assert (wider.config.model.num_layers, wider.config.model.kv_channels) == (3, 16)


def test_a_damaged_configuration_of_a_run_is_kept_and_stops_nothing(tmp_path):
    (tmp_path / "config.toml").write_bytes(b"\0\0\0")
    kept(tmp_path, 5)
    assert (tmp_path / "config-1.toml").read_bytes() == b"\0\0\0"
    assert "the one before is damaged" in (tmp_path / "config_changes.txt").read_text()
    assert config_of("--config", tmp_path / "config.toml").model.num_layers == 4


def test_a_path_that_is_no_text_stops_no_run_from_keeping_its_configuration(tmp_path):
    kept(tmp_path, 0, "--tensorboard-dir", "t\udce9")
    assert "# tensorboard-dir is a path that no text can say" in (tmp_path / "config.toml").read_text()
    kept(tmp_path, 9, "--tensorboard-dir", "t\udce9")
    assert not (tmp_path / "config-1.toml").exists()


def test_a_value_that_fills_a_line_goes_without_help():
    config, _ = parse(["--preset", "demo", "--data-path", "0.3", "/a" * 40, "0.7", "/b" * 40, "--save", "/c" * 90])
    lines = as_toml(config, config, "flags").splitlines()
    assert f'data-path = ["0.3", "{"/a" * 40}", "0.7", "{"/b" * 40}"]' in lines
    assert f'save = "{"/c" * 90}"' in lines
