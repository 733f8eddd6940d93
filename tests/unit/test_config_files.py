"""A configuration file says the same as flags, flags override it, and a mistake in it gives one line."""

import ast
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from megatron.config import Config
from megatron.config.command_line import as_flags, left_open, parse, read
from megatron.config.declaration import flag_name, is_switch
from megatron.config.reading.checks import plain
from megatron.config.reading.files import read_file
from megatron.config.reading.presets import PRESETS
from megatron.errors import ConfigError
from pretrain_tape import main

ITEMS = [item for _, section in Config().sections() for item in fields(section)]
FOLDER = Path(__file__).parents[2] / "megatron" / "config" / "presets"


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of the given name, and returns its path as text."""
    def write(content, name="run.toml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def config_of(*argv):
    return parse([str(word) for word in argv])[0]


def in_toml(item, text):
    """A value of the command line as TOML has it: numbers as numbers, all else as text."""
    return text if item.metadata["type"] in (int, float) and text != "two" else f'"{text}"'


def accepted(work):
    try:
        return work()
    except ConfigError:
        return "refused"


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_a_key_takes_what_its_flag_takes(item, write):
    name = flag_name(item)
    if is_switch(item):
        for value, words in (("true", [name]), ("false", [f"--no-{name[2:]}"])):
            if item.name.startswith("no_") and value == "false":
                continue
            assert read_file(Path(write(f"{name[2:]} = {value}")), ()) == read(words).of_flags
        return
    texts = [*map(str, item.metadata["choices"] or ()), "3", "0.5", "-1", "inf", "two"]
    for text in texts:
        num = item.metadata["nargs"] if isinstance(item.metadata["nargs"], int) else 1
        value = in_toml(item, text)
        value = f"[{', '.join([value] * num)}]" if item.metadata["nargs"] else value
        by_file = accepted(lambda value=value: read_file(Path(write(f"{item.name} = {value}")), ())[item.name])
        words = [name, *[text] * num] if num > 1 else [f"{name}={text}"]
        by_flag = accepted(lambda words=words: plain(read(words).of_flags).as_dict()[item.name])
        assert by_file == by_flag, (name, text)


def test_keys_are_flat_or_in_tables_with_dashes_or_underscores(write):
    flat = write('preset = "demo"\nhidden-size = 256\nlr = 1e-4\nno-qk-layernorm = true\nvocab = "esm"\n')
    tables = write('preset = "demo"\n[model]\nhidden_size = 256\nqk_layernorm = false\n[schedule]\nlr = 1e-4\n'
                   '[data]\nvocab-file = "esm"\n', "tables.toml")
    yaml = write("preset: demo\nmodel:\n  hidden-size: 256\n  qk-layernorm: off\nlr: 1e-4\nvocab_file: esm\n",
                 "run.yaml")
    expected = config_of(*"--preset demo --hidden-size 256 --lr 1e-4 --no-qk-layernorm --vocab-file esm".split())
    assert config_of("--config", flat) == config_of("--config", tables) == config_of("--config", yaml) == expected


def test_lists_hold_numbers_and_texts_and_one_value_needs_no_list(write):
    file = write('preset = "demo"\ndata-path = [0.7, "a", 0.3, "b"]\nmask-prob = 0.2\nwindow-size = [4, 4]\n')
    config = config_of("--config", file)
    assert config.data.data_path == ("0.7", "a", "0.3", "b")
    assert (config.data.mask_prob, config.model.window_size) == ((0.2,), (4, 4))


@pytest.mark.parametrize(("content", "flags", "expected"), [
    ("", "--preset demo", {"lr": 1e-3, "num_layers": 4, "seed": 1234}),
    ('preset = "demo"\nlr = 2e-3', "", {"lr": 2e-3, "num_layers": 4}),
    ("lr = 2e-3", "--preset demo --lr 3e-3", {"lr": 3e-3, "num_layers": 4}),
    ('preset = "demo"\nlr = 2e-3', "--preset tape", {"lr": 2e-3, "num_layers": 12}),
    # What says a thing in other words replaces it, of a preset and of a file.
    ('preset = "tape"\nfp16 = true', "", {"fp16": True, "bf16": False}),
    ('preset = "tape"\nfp16 = false', "", {"fp16": False, "bf16": True}),
    ('preset = "demo"\nbf16 = false', "", {"precision": None}),
    ('preset = "tape"\ntrain-samples = 5000', "", {"train_iters": None, "lr_decay_iters": None}),
    ('preset = "tape"\ntrain-samples = 5000', "--train-iters 70", {"train_iters": 70, "train_samples": None}),
    ("train-iters = 9\nlr-decay-iters = 9", "--preset demo --train-samples 90", {"train_iters": None}),
    ("lr-warmup-iters = 7", "--preset demo", {"lr_warmup_fraction": None, "lr_warmup_iters": 7}),
    ("lr-warmup-iters = 7", "--preset demo --lr-warmup-fraction 0.2", {
        "lr_warmup_fraction": 0.2, "lr_warmup_iters": 0}),
    ('recompute-granularity = "selective"', "--preset demo --checkpoint-activations", {
        "recompute_granularity": None, "checkpoint_activations": True}),
    ('recompute-granularity = "selective"', "--preset proteinlm-3b", {"checkpoint_activations": False}),
    ('weight-decay-incr-style = "linear"\nstart-weight-decay = 0.0\nend-weight-decay = 0.1', "--preset demo "
     "--weight-decay 0.2", {"weight_decay": 0.2, "weight_decay_incr_style": "constant", "end_weight_decay": None}),
])
def test_flags_win_over_the_file_and_the_file_over_the_preset(content, flags, expected, write):
    file = ["--config", write(content)] if content else []
    values = config_of(*file, *flags.split()).as_dict()
    assert {name: values[name] for name in expected} == expected
    assert config_of(*flags.split(), *file).as_dict() == values  # the order of words does not matter


MISTAKES = [
    ("num-layer = 2", "run.toml: num-layer is no flag; did you mean num-layers?"),
    ("[model]\nhiden-size = 2", "run.toml: [model] hiden-size is no flag; did you mean hidden-size?"),
    ("zzz = 2", "run.toml: zzz is no flag; pretrain_tape.py --help-all lists them"),
    ("[modell]\nhidden-size = 2", "run.toml: [modell] is no section; did you mean model?"),
    ("[zzz]\nx = 2", "run.toml: [zzz] is no section; they are model, data, optimizer, schedule,"),
    ("[model.deep]\nx = 2", "run.toml: [model.deep] is a table in a section; write deep = VALUE in [model]"),
    ("[model]\nlr = 1.0", "run.toml: [model] lr is of another section; write it in [schedule], or above all tables"),
    ('[model]\npreset = "demo"', "run.toml: [model] preset is of no section; write it above all tables"),
    ('num-layers = "two"', "run.toml: num-layers is 'two'; it must be a whole number"),
    ("num-layers = 2.0", "run.toml: num-layers is 2.0; it must be a whole number"),
    ("num-layers = true", "run.toml: num-layers is true; it must be a whole number"),
    ("num-layers = [2]", "run.toml: num-layers is [2]; it must be a whole number"),
    ("num-layers = 0", "run.toml: num-layers is 0; it must be greater than 0"),
    ("lr = nan", "run.toml: lr is nan; it must be a finite number"),
    ("lr = 2026-01-01", "run.toml: lr is 2026-01-01; it must be a number"),
    ("split = false", "run.toml: split is false; it must be text"),
    ("swiglu = 1", "run.toml: swiglu is 1; it must be true or false"),
    ('optimizer = "adm"', "optimizer is 'adm'; it must be one of adam, sgd, muon, normuon; did you mean adam?"),
    ("window-size = [1, 2, 3]", "run.toml: window-size is [1, 2, 3]; it must be a list of 2"),
    ("data-path = []", "run.toml: data-path is []; it must be a list of one or more"),
    ('preset = "dem"', "run.toml: preset is 'dem'; it must be one of protbert, tape, "),
    ('preset = "_esm2"', "run.toml: preset is '_esm2'; it must be one of "),
    ('load = "~/run"', "run.toml: load is '~/run', where the shell should have put something in"),
    ("hidden-size = 2\nhidden_size = 3", "run.toml: hidden_size says again what hidden-size said; keep one"),
    ('vocab = "esm"\n[data]\nvocab-file = "esm"', "run.toml: [data] vocab-file says again what vocab said"),
    ("lr = 1\nlr = 2\n", "run.toml is no TOML (YAML ends in .yaml): Cannot overwrite a value (at line 2"),
    ("lr: 1", "run.toml is no TOML (YAML ends in .yaml): "),
    ("merge-file = 1", "run.toml: merge-file cannot be used: it belongs to GPT"),
    ("no-save-rng = false", "run.toml: no-save-rng is false; it is always true: "),
    ('config = "b.toml"', "run.toml: config is no flag"),
    ("", "run.toml says nothing; give it keys such as hidden-size = 256"),
    (b"lr = 1\nsave = '\xff'", "run.toml: line 2 is not UTF-8; save it as that"),
    ("a = " + "[" * 5000, "run.toml is no TOML"),
]


@pytest.mark.parametrize(("content", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_a_mistake_in_a_file_is_one_line_that_names_file_and_key(content, message, write, capsys):
    assert main(["--preset", "demo", "--config", write(content)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err


@pytest.mark.parametrize(("content", "message"), [
    ("lr: 1e-3\nlr: 2e-3", "run.yaml is no YAML: the key lr is there twice (line 1 and below)"),
    ("model:\n  lr: [", "run.yaml is no YAML: "),
    ("- 1\n- 2", "run.yaml holds [1, 2]; it must be keys with values, such as hidden-size: 256"),
    ("optimizer: on", "run.yaml: optimizer is true; it must be one of adam"),
    ("data-path: &a [*a]", "run.yaml is no YAML: found unconstructable recursive node"),
    ("data-path: [[1]]", "run.yaml: data-path is [1]; it must be text"),
    ("lr:", "run.yaml: lr is empty; it must be a number"),
    ("# nothing", "run.yaml says nothing"),
])
def test_a_mistake_in_yaml_is_one_line_too(content, message, write):
    with pytest.raises(ConfigError) as caught:
        config_of("--preset", "demo", "--config", write(content, "run.yaml"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_none_is_said(tmp_path, write):
    with pytest.raises(ConfigError, match="nowhere.toml cannot be read .No such file or directory.; give a file"):
        read(["--config", str(tmp_path / "nowhere.toml")])
    with pytest.raises(ConfigError, match="cannot be read .Is a directory."):
        read(["--config", str(tmp_path)])
    with pytest.raises(ConfigError, match="--config is given twice"):
        read(["--config", write("lr = 1"), f"--config={write('lr = 2', 'b.toml')}"])


def test_a_reader_that_is_missing_is_named(write, monkeypatch):
    for name in ("tomllib", "tomli", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="before Python 3.11 TOML needs the package tomli; install it with pip"):
        read(["--config", write("lr = 1")])
    with pytest.raises(ConfigError, match="YAML needs the package PyYAML; install it with pip"):
        read(["--config", write("lr: 1", "run.yml")])


def test_flags_that_are_always_so_may_stand_in_a_file(write):
    config, always_so = parse(["--preset", "demo", "--config", write("no-save-rng = true\nlr = 2e-3")])
    assert (config.schedule.lr, always_so) == (2e-3, ("--no-save-rng",))


def test_every_preset_is_a_file_and_every_beginning_is_one_of_some_preset():
    files = {path.stem: path for path in FOLDER.glob("*/*.toml")}
    assert {name for name in files if not name.startswith("_")} == set(PRESETS)
    used = {read_file(path, files).get("preset") for path in files.values()} - {None}
    assert used == {name for name in files if name.startswith("_")}


def test_presets_are_in_what_is_installed():
    call = ast.parse((FOLDER.parents[2] / "setup.py").read_text()).body[-1].value
    patterns = ast.literal_eval(next(word.value for word in call.keywords if word.arg == "package_data"))
    assert {path for pattern in patterns["megatron.config.presets"] for path in FOLDER.glob(pattern)} == set(
        FOLDER.rglob("*.toml"))


def test_a_preset_can_be_read_as_a_file_once_its_beginning_is_known(write):
    text = (FOLDER / "recipe" / "demo.toml").read_text().replace('"_recipe"', '"recipe-8m"')
    config = config_of("--config", write(text))
    assert config.model == config_of("--preset", "demo").model
    assert config.training.train_iters == 1000


def test_a_checkpoint_gives_what_neither_file_nor_flags_say(write):
    saved = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 2, "hidden_dropout": 0.5}
    file = write('load = "there"\nhidden-size = 96\nseq-length = 32\nmicro-batch-size = 1\nlr = 1e-3\ntrain-iters = 1')
    taken = left_open(["--config", file, "--num-attention-heads", "4"], {"there": saved}.__getitem__)
    assert taken == {"num_layers": 3, "hidden_dropout": 0.5}
    model = parse(["--config", file, "--num-attention-heads", "4"], taken)[0].model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (3, 96, 4)


@pytest.mark.parametrize("flags", ["", "--lr 3e-3 --unet-skips", "--train-samples 80 --lr-warmup-samples 2",
                                   "--preset tape"])
def test_a_file_as_flags_gives_the_same_configuration(flags, write):
    file = write('preset = "demo"\ntrain-iters = 9\nfp16 = true\nno-bias-gelu-fusion = true\ndata-path = ["a b"]\n'
                 "lr-warmup-iters = 2\nmax-position-embeddings = 2176\nattention-softmax-in-fp32 = true")
    argv = ["--eval-at-start", f"--config={file}", *flags.split()]
    words = as_flags(argv)
    assert not any("--config" in word for word in words)
    assert config_of(*words) == config_of(*argv)
    assert as_flags(["--lr", "1"]) == ["--lr", "1"]
