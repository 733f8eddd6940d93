"""The command line: Megatron's spellings, presets, and one clear line for whatever cannot be honoured."""

from dataclasses import fields
from typing import get_args

import pytest
import torch

from megatron.config import (
    Config,
    DataConfig,
    GuardsConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron.config.command_line import left_open, parse, resolve
from megatron.config.declaration import Changes, flag_name
from megatron.config.reading.megatron_flags import ALWAYS_SO, REFUSED
from megatron.config.reading.presets import PRESETS
from megatron.config.telling.idle import notes
from megatron.config.telling.listing import listing, notice
from megatron.errors import ConfigError
from megatron.optim.schedule import build_schedule
from megatron.parallel.compilation import wants_compilation
from megatron.train.setup.resume import differences

# Spellings of Megatron-LM v2 that users' scripts hold; frozen.
MEGATRON_FLAGS = """
--num-layers --hidden-size --ffn-hidden-size --num-attention-heads --kv-channels --max-position-embeddings
--make-vocab-size-divisible-by --layernorm-epsilon --apply-residual-connection-post-layernorm --openai-gelu
--attention-dropout --hidden-dropout --weight-decay --clip-grad --adam-beta1 --adam-beta2 --adam-eps --sgd-momentum
--micro-batch-size --global-batch-size --rampup-batch-size --checkpoint-activations --checkpoint-num-layers
--train-iters --train-samples --log-interval --exit-interval --exit-duration-in-mins --tensorboard-dir --optimizer
--seed --init-method-std --lr --lr-decay-style --lr-decay-iters --lr-decay-samples --lr-warmup-fraction
--lr-warmup-iters --lr-warmup-samples --min-lr --override-lr-scheduler --use-checkpoint-lr-scheduler --save
--save-interval --no-save-optim --no-save-rng --load --no-load-optim --no-load-rng --finetune --fp16 --bf16
--loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis --fp32-residual-connection
--no-query-key-layer-scaling --attention-softmax-in-fp32 --accumulate-allreduce-grads-in-fp32 --fp16-lm-cross-entropy
--tensor-model-parallel-size --pipeline-model-parallel-size --model-parallel-size --distributed-backend --DDP-impl
--local_rank --use-cpu-initialization --eval-iters --eval-interval --data-path --split --vocab-file --vocab
--seq-length --encoder-seq-length --mask-prob --mmap-warmup --num-workers --tokenizer-type --data-impl --batch-size
--no-bias-gelu-fusion --no-bias-dropout-fusion --scaled-masked-softmax-fusion --fp32-allreduce
--distribute-checkpointed-activations --sequence-parallel --num-layers-per-virtual-pipeline-stage
--use-distributed-optimizer --context-parallel-size --recompute-granularity --recompute-activations
--lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples --weight-decay-incr-style --start-weight-decay
--end-weight-decay --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --distributed-timeout-minutes
""".split()


def parsed(text):
    return parse(text.split())[0]


def error_of(text):
    with pytest.raises(ConfigError) as caught:
        parse(text.split())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_megatrons_spelling_is_known(capsys):
    with pytest.raises(SystemExit):
        parse(["--help-all"])
    words = {*capsys.readouterr().out.replace(",", " ").split()}
    assert [flag for flag in MEGATRON_FLAGS if not words & {
        flag, flag.replace("--", "--[no-]", 1), flag.replace("--no-", "--[no-]", 1)}] == []


def test_every_field_is_one_flag_and_every_flag_one_field():
    names = [flag_name(item) for section in fields(Config) for item in fields(section.default_factory)]
    assert len(names) == len(set(names))
    assert not set(names) & (set(REFUSED) | set(ALWAYS_SO))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_whole(preset):
    assert set(PRESETS[preset]) <= set(Config().as_dict())
    parsed(f"--preset {preset}")


def test_the_published_hyperparameters_stand_in_the_presets():
    for preset, layers, hidden, heads in (("tape", 12, 768, 12), ("proteinlm-200m", 16, 1024, 16)):
        config = parsed(f"--preset {preset}")
        assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (
            layers, hidden, heads)
        assert (config.data.seq_length, config.model.max_position_embeddings) == (2176, 2176)
        assert (config.schedule.lr, config.schedule.min_lr, config.schedule.lr_decay_style) == (1e-4, 1e-5, "linear")
        assert (config.schedule.lr_decay_iters, config.schedule.lr_warmup_fraction) == (990_000, 0.01)
        assert (config.optimizer.weight_decay, config.optimizer.clip_grad) == (0.01, 1.0)
        assert config.model.layernorm_epsilon == 1e-12


def test_a_flag_overrides_the_preset_and_the_last_one_wins():
    config = parsed("--preset demo --hidden-size 64 --hidden-size 96 --num-layers 2")
    assert (config.model.hidden_size, config.model.num_layers, config.model.ffn_hidden_size) == (96, 2, 384)


def test_a_precision_flag_replaces_the_presets():
    assert parsed("--preset tape").precision.bf16
    assert parsed("--preset tape --fp16").precision.fp16
    assert not parsed("--preset tape --fp16").precision.bf16
    assert not parsed("--preset tape --no-bf16").precision.bf16


def test_training_by_samples_replaces_the_presets_iterations():
    config = parsed("--preset tape --train-samples 5000")
    assert config.training.train_iters is None
    assert config.schedule.lr_decay_iters is None


def test_a_presets_warm_up_in_iterations_steps_back_for_samples_and_is_missed():
    assert parsed("--preset esm2-8m --train-samples 5000").schedule.lr_warmup_iters == 0
    [note] = notes_of("--preset esm2-8m --train-samples 5000")
    assert note.startswith("note: the preset's --lr-warmup-iters 2000 does not count for --train-samples")
    assert notes_of("--preset esm2-8m --train-samples 5000 --lr-warmup-samples 50") == []
    assert "goes with --lr-warmup-samples, not with --lr-warmup-iters" in error_of(
        "--preset tape --train-samples 5000 --lr-warmup-iters 9")


@pytest.mark.parametrize(("text", "samples"), [
    ("--preset demo --lr-warmup-iters 7", 28), ("--preset demo --lr-warmup-iters 0", 0),
    ("--preset demo --lr-warmup-iters 7 --lr-warmup-fraction 0", 28), ("--preset demo --lr-warmup-fraction 0", 0),
    ("--preset tape --train-samples 900 --lr-warmup-samples 50", 50),
    ("--preset tape --train-samples 900 --lr-warmup-fraction 0.5", 450), ("--preset demo", 400)])
def test_any_flag_of_the_warm_up_replaces_the_presets(text, samples):
    config = parsed(text)
    schedule = build_schedule(config.schedule, global_batch_size=4, train_iters=config.training.train_iters,
                              train_samples=config.training.train_samples)
    assert schedule.warmup_samples == samples


def test_how_much_is_recomputed_replaces_the_presets_choice():
    assert parsed("--preset proteinlm-3b").model.checkpoint_activations
    assert not parsed("--preset proteinlm-3b --recompute-granularity selective").model.checkpoint_activations
    assert parsed("--preset demo --recompute-granularity full").model.checkpoint_activations
    assert parsed("--preset demo --recompute-activations").model.checkpoint_activations


def test_megatrons_distributed_optimizer_is_a_way_of_sharding():
    assert parsed("--preset demo --use-distributed-optimizer").parallel.data_parallel_sharding == "optimizer"


def test_a_switch_that_is_on_by_default_can_be_turned_off():
    assert not parsed("--preset demo --no-bias-gelu-fusion").model.bias_gelu_fusion


def test_old_aliases_work():
    config = parsed("--preset demo --vocab v.txt --local_rank 3 --batch-size 7 --model-parallel-size 1")
    assert (config.data.vocab_file, config.parallel.local_rank, config.training.micro_batch_size) == ("v.txt", 3, 7)
    assert parsed("--preset demo --local-rank=2").parallel.local_rank == 2


def test_flags_that_are_always_so_are_accepted_and_listed():
    config, always_so = parse("--preset demo --attention-softmax-in-fp32 --no-save-rng".split())
    assert always_so == ("--attention-softmax-in-fp32", "--no-save-rng")
    text = listing(config, always_so)
    assert "--no-save-rng: always so" in text
    assert "hidden_size ................................... 128" in text


def notes_of(text):
    resolved = resolve(text.split())
    return notes(resolved.config, resolved.given.said, resolved.given.of_preset)


@pytest.mark.parametrize(("flags", "owner", "without"), [
    ("--save-interval 5", "--save DIR", "--save"), ("--save-interval-minutes 0.5", "--save DIR", "--save"),
    ("--async-save", "--save DIR", "--save"), ("--keep-checkpoints 2", "--save DIR", "--save"),
    ("--keep-every 2", "--save DIR", "--save"), ("--save-retain-optimizer 1", "--save DIR", "--save"),
    ("--no-save-optim", "--save DIR --no-load-optim --load DIR", "--save"),
    ("--no-load-optim", "--load DIR", "--load"), ("--profile-step-start 3", "--profile --save DIR", "--profile"),
    ("--profile-ranks 0 1", "--profile --save DIR", "--profile"), ("--dry-run-ranks 2", "--dry-run", "--dry-run"),
    ("--adam-eps 0.1", "--optimizer adam", "another --optimizer than sgd")])
def test_a_flag_that_is_given_without_what_it_is_about_is_told(flags, owner, without):
    common = f"--preset demo --optimizer sgd {flags}"
    assert notes_of(common) == [f"note: {flags} changes nothing without {without}"]
    assert notes_of(f"{common} {owner}") == []


def test_values_of_a_preset_and_defaults_are_idle_unsaid():
    assert notes_of("--preset tape --optimizer sgd --keep-checkpoints 0 --profile-ranks 0") == []


def test_a_command_that_cannot_go_on_from_its_own_checkpoints_says_so():
    [note] = notes_of("--preset demo --save DIR --load DIR --no-save-optim")
    assert note.startswith("note: with --no-save-optim the same command does not go on from its checkpoints")
    assert notes_of("--preset demo --save DIR --load DIR --no-save-optim --optimizer sgd --sgd-momentum 0") == []


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_foreign_flags_say_why(flag):
    assert error_of(f"--preset demo {flag} 1").startswith(f"{flag} cannot be used: ")


@pytest.mark.parametrize(("text", "message"), [
    ("--preset demo --num-layer 2", "unknown argument --num-layer; did you mean --num-layers?"),
    ("--preset demo --hidden-size 130", "--hidden-size 130 is not divisible by --num-attention-heads 4"),
    ("--preset demo --num-layers two", "--num-layers is 'two'; it must be a whole number"),
    ("--preset demo --local_rank 1.0", "--local-rank is '1.0'; it must be a whole number"),
    ("--preset demo --lr -1", "--lr is -1.0; it must be greater than 0"),
    ("--preset tape --seq-length 2048 --max-position-embeddings 64", "--seq-length 2048 needs as many positions"),
    ("--preset demo --fp16 --bf16", "--fp16 and --bf16 exclude each other"),
    ("--preset demo --train-samples 9 --train-iters 9", "give one of --train-iters and --train-samples"),
    ("--preset demo --rampup-batch-size 4 4 100", "--rampup-batch-size goes with --train-samples"),
    ("--preset demo --lr-warmup-iters 5 --lr-warmup-fraction 0.1", "--lr-warmup-fraction excludes"),
    ("--preset demo --lr-warmup-iters 1000",
     "--lr-warmup-iters is 1000, and the learning rate is to have decayed after 1000 iters; give a shorter warm-up, or "
     "more --lr-decay-iters (default: all of --train-iters)"),
    ("--preset demo --train-samples 90 --lr-warmup-samples 80 --lr-decay-samples 70",
     "--lr-warmup-samples is 80, and the learning rate is to have decayed after 70 samples"),
    ("--preset demo --min-lr 1", "--min-lr 1.0 is above --lr"),
    ("--preset demo --recompute-granularity selective --checkpoint-activations", "exclude each other; give one"),
    ("--preset demo --use-distributed-optimizer --data-parallel-sharding parameters",
     "--use-distributed-optimizer is --data-parallel-sharding optimizer, which is given as parameters"),
    ("--preset demo --dry-run --dry-run-ranks 16385", "--dry-run-ranks is 16385; it must be between 1 and 16384"),
    ("--preset demo --logger wandb tensorboardx", "--logger: invalid choice: 'tensorboardx'"),
    ("--preset demo --logger-project mine", "--logger-project mine is of --logger, which is missing; give both"),
    ("--preset demo --metrics-host 0.0.0.0", "--metrics-host 0.0.0.0 is of --metrics-port, which is missing; "),
    ("--preset demo --metrics-port 65536", "--metrics-port is 65536; it must be a port, 1 to 65535, or 0"),
    ("--preset demo --mask-token-prob 0.9 --mask-random-prob 0.2", "sum to more than 1"),
    ("--preset demo --fp16 --loss-scale 128 --hysteresis 3", "--hysteresis 3 is about a dynamic loss scale, and "
     "--loss-scale 128.0 is fixed; leave one of the two out"),
    ("--preset demo --fp16 --initial-loss-scale 1024 --min-loss-scale 4096", "--min-loss-scale 4096.0 is above "),
    ("--preset demo --sgd-momentum 0.8", "--sgd-momentum 0.8 is about --optimizer sgd, which is muon; leave one of "),
    ("--lr 1e-3", "--seq-length is missing"),
    ("--preset demo --seq-length 2 --protein-ends both", "--seq-length 2 holds no residue between the ends of "
     "--protein-ends both; it must be 3 or greater"),
    ("--preset demo --protein-ends none", "--protein-ends: invalid choice: 'none'"),
])
def test_a_mistake_is_one_line_that_names_the_flag(text, message):
    assert message in error_of(text)


@pytest.mark.parametrize("section", [ModelConfig, DataConfig, OptimizerConfig, PrecisionConfig, TrainingConfig,
                                     GuardsConfig])
def test_every_flag_of_these_says_what_another_value_changes_on_going_on(section):
    kinds = {item.name: item.metadata["changes"] for item in fields(section)}
    assert not [name for name, kind in kinds.items() if kind not in get_args(Changes)]


def test_attention_that_is_recomputed_by_itself_is_not_compiled():
    both = error_of("--preset demo --recompute-granularity selective --compile")
    assert "--checkpoint-activations in its place" in both
    config = parsed("--preset demo --recompute-granularity selective")
    assert not wants_compilation(config, torch.device("cuda"))
    assert wants_compilation(parsed("--preset demo"), torch.device("cuda"))


@pytest.mark.parametrize("flags", [["--save", ""], ["--load", "~/run"], ["--data-path", "0.5", "a", "0.5", ""]])
def test_what_a_shell_did_not_fill_in_is_no_path(flags):
    with pytest.raises(ConfigError, match=f"{flags[0]} is .*the shell should have put something in"):
        parse(["--preset", "demo", *flags])


@pytest.mark.parametrize("flag", ["--lr", "--weight-decay", "--clip-grad", "--distributed-timeout-minutes"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_of_a_flag_is_finite(flag, value):
    assert error_of(f"--preset demo {flag} {value}") == f"{flag} is {value}; it must be a finite number"


def test_flags_of_the_model_that_are_not_given_are_those_of_the_checkpoint():
    saved = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 2, "lr": 7.0, "hidden_dropout": 0.5}
    argv = "--load there --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --lr 1e-3 --train-iters 1".split()
    taken = left_open(argv, {"there": saved}.__getitem__)
    # What changes the arithmetic, or comes with a model, and is not given.
    assert taken == {"num_layers": 3, "hidden_size": 48, "hidden_dropout": 0.5}
    config, _ = parse(argv, taken)
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (3, 48, 4)
    assert notice(taken) == ("taken from the checkpoint, as no flag says otherwise: --num-layers 3, --hidden-size 48, "
                             "--hidden-dropout 0.5")
    assert left_open([*argv, "--preset", "demo"], {"there": saved}.__getitem__) == {}
    assert left_open(["--num-layers", "2"], {}.__getitem__) == {}
    assert notice({"num_layers": 12}) is None
    assert notice({"swiglu": True, "mask_prob": [0.3, 0.15, 9.0]}).endswith(": --swiglu on, --mask-prob 0.3 0.15 9.0")


def test_what_a_run_goes_on_with_otherwise_is_said_as_on_the_command_line():
    config = Config()
    now = {"config": config.as_dict() | {"data_path": ("a", "b")}, "data": [1], "clusters": []}
    before = {name: list(value) if isinstance(value, tuple) else value for name, value in now["config"].items()}
    others = {"data_path": ["c"], "mask_prob": [0.3], "cautious_weight_decay": True, "clip_grad": None}
    said = "\n".join(differences(config, now, {"config": before | others, "data": [2], "clusters": []}))
    for line in ("note: --data-path is a b, it was c before: ", "note: --mask-prob is 0.15, it was 0.3 before: ",
                 "note: --cautious-weight-decay is off, it was on before: ",
                 "note: --clip-grad is 1.0, it was none before: "):
        assert line in said, said


def test_the_vocabulary_is_the_checkpoints_where_none_is_named_and_its_file_is_here(tmp_path):
    file = tmp_path / "v.txt"
    saved = {"vocab_file": str(file), "mask_token": "#", "protein_ends": "both"}
    take = {"there": saved}.__getitem__
    assert left_open(["--load", "there"], take) == {"protein_ends": "both"}
    file.touch()
    assert left_open(["--load", "there"], take) == saved
    moved = file.rename(tmp_path / "moved.txt")
    assert left_open(["--load", "there", "--vocab", str(moved)], take) == {"mask_token": "#", "protein_ends": "both"}
    saved["vocab_file"] = "esm"
    config, _ = parse(["--preset", "demo"], left_open(["--load", "there"], take))
    assert (config.data.vocab_file, config.data.mask_token, config.data.num_ends) == ("esm", "#", 2)
