"""Lists the layouts in which some GPUs can train a model, the fastest first, without any GPU:

    python tools/plan_layout.py --preset proteinlm-3b --gpus 64 --gpu h100-80gb --global-batch-size 2048

In addition to its own flags, this tool accepts all flags of pretrain_tape.py; with --load, the checkpoint defines the
model. What they set of a layout is kept, and the rest is tried: tensor, pipeline and, if nothing fits without it,
context parallelism, schedules, sharding, recomputation, rows of a micro-batch. Memory and communication are measured on
the model's parts, run on tensors without values, and tests compare them with whole dry runs. Times are estimates.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.newest import saved_flags  # noqa: E402
from megatron.config import Config  # noqa: E402
from megatron.config.command_line import OneLineParser, left_open, parse, resolve  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.log import exit_status  # noqa: E402
from megatron.parallel.traffic import ALL_GATHER, EXCHANGE  # noqa: E402
from megatron.plan.gpus import GPUS  # noqa: E402
from megatron.plan.search import Machine, Plan, best_plans, layout_flags  # noqa: E402

_GIB = 2**30
_ANY = {"micro_batch_size": 1, "lr": 1e-4, "train_iters": 1}  # no layout depends on these: they need not be given


def main(argv: Sequence[str]) -> int:
    """The exit status: 0, 2 for a mistake of the user's and where nothing fits, 130 after Ctrl-C."""
    return exit_status(lambda: plan_layouts(*_parser().parse_known_args(argv)))


def plan_layouts(own: argparse.Namespace, rest: Sequence[str]) -> None:
    """Print the layouts; raises a UserError."""
    machine = _machine(own)
    plans = best_plans(parse(rest, _ANY | left_open(rest, saved_flags))[0], machine, _given(rest))
    shown = plans[:own.top]
    if own.json:
        print(json.dumps([facts(plan) for plan in shown], indent=1))
        return
    room = f"{machine.memory / _GIB:.1f} GiB a GPU"
    print(f"{len(plans)} layouts of {machine.num_gpus} x {machine.name} fit into {room}; the fastest first:\n")
    print(table(shown))
    print("\nthe first, behind pretrain_tape.py and the model's own flags:\n")
    print("  " + " ".join(layout_flags(shown[0].config)))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"kind of GPU: {', '.join(GPUS)}")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs in a host (default: 8)")
    parser.add_argument("--memory-margin", type=float, default=0.1, metavar="SHARE",
                        help="share of a GPU's memory to leave to CUDA, its libraries and fragments (default: 0.1)")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="number of layouts to show (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser


def _machine(own: argparse.Namespace) -> Machine:
    for name in ("gpus", "gpus_per_node", "top"):
        if getattr(own, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(own, name)}; it must be 1 or greater")
    if not 0 <= own.memory_margin < 1:
        raise ConfigError(f"--memory-margin is {own.memory_margin}; it must be at least 0 and less than 1")
    return Machine(own.gpu, own.gpus, own.gpus_per_node, own.memory_margin)


def _given(rest: Sequence[str]) -> set[str]:
    """The flags that the user gave; of a file, which may hold all there are, those that are not as by default."""
    defaults = Config().as_dict()
    return {argument.split("=")[0] for argument in rest} | {
        f"--{name.replace('_', '-')}" for name, value in resolve(rest, _ANY).given.of_file.items()
        if value != defaults[name]}


def facts(plan: Plan) -> dict:
    """Everything about a plan that JSON can hold."""
    parallel, model, memory, sent = plan.config.parallel, plan.config.model, plan.memory, plan.traffic.sent
    recompute = "full" if model.checkpoint_activations else model.recompute_granularity or "none"
    sharding = "none, torch" if parallel.DDP_impl == "torch" else parallel.data_parallel_sharding
    schedule = parallel.pipeline_schedule if plan.sizes["pipeline"] > 1 else "-"
    if parallel.num_layers_per_virtual_pipeline_stage:
        schedule = f"1f1b, by {parallel.num_layers_per_virtual_pipeline_stage}"
    kinds = {axis: sum(size for (name, operation), size in sent.items() if name == axis and operation != EXCHANGE)
             for axis in ("tensor", "context", "pipeline", "data")}
    parameters = sent["data", ALL_GATHER]
    return {**{f"{axis}_ranks": size for axis, size in plan.sizes.items()}, "schedule": schedule,
            "sequence_parallel": parallel.sequence_parallel, "sharding": sharding, "recompute": recompute,
            "micro_batch_size": plan.config.training.micro_batch_size, "parameter_bytes": memory.parameters,
            "gradient_bytes": memory.gradients, "optimizer_bytes": memory.optimizer,
            "activation_bytes": memory.activations, "peak_bytes": memory.peak,
            **{f"{axis}_bytes_sent": kinds[axis] for axis in ("tensor", "context", "pipeline")},
            "gradient_bytes_sent": kinds["data"] - parameters,
            "parameter_bytes_sent": parameters + sum(size for (_, kind), size in sent.items() if kind == EXCHANGE),
            "bubble": plan.time.bubble, "step_s": plan.time.step_s, "mfu": plan.time.mfu,
            "flags": layout_flags(plan.config)}


def table(plans: Sequence[Plan]) -> str:
    """The plans, one a line, under their units."""
    heads = (f"{'ranks of':<16}rows{'':34}|{'memory, GiB a GPU':^25} |{'sent, GiB a GPU and step':^30} |"
             "  idle     step   MFU\n tp pp cp    dp    schedule    sharding    recompute |param grad optim  act peak |"
             "tensor contxt  pipe  grad param |     %        s     %")
    return "\n".join([heads, *(_line(facts(plan)) for plan in plans)])


def _line(plan: dict) -> str:
    memory = "".join(f"{plan[f'{kind}_bytes'] / _GIB:5.1f}" for kind in (
        "parameter", "gradient", "optimizer", "activation", "peak"))
    sent = "".join(f"{plan[f'{kind}_bytes_sent'] / _GIB:6.1f}" for kind in (
        "tensor", "context", "pipeline", "gradient", "parameter"))
    return (f"{plan['tensor_ranks']:3}{plan['pipeline_ranks']:3}{plan['context_ranks']:3}{plan['data_ranks']:6}"
            f"{plan['micro_batch_size']:3} {plan['schedule']:<11} {plan['sharding']:<11} {plan['recompute']:<9} |"
            f"{memory} |{sent} |{100 * plan['bubble']:6.1f} {plan['step_s']:8.3f} {100 * plan['mfu']:5.1f}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
