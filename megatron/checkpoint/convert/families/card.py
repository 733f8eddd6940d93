"""Writes the model card of a folder of transformers: what the model is and how it was trained, as far as known."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron.checkpoint.contents import Checkpoint
from megatron.checkpoint.metrics import OF_AVERAGE, evaluations_of, loss_name, read_records
from megatron.checkpoint.places import METRICS_FILE

CARD = "README.md"
_LICENCE = re.compile(r"^license:\s*([A-Za-z0-9.\-]{1,40})\s*$", re.MULTILINE)
_LONGEST = 2**20


def licence_in(folder: Path) -> str | None:
    """The licence in the front matter of a folder's model card; None if there is none."""
    try:
        with (folder / CARD).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LONGEST)
    except OSError:
        return None
    head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    match = _LICENCE.search(head)
    return match[1] if match else None


def card_of(checkpoint: Checkpoint, config: Mapping[str, Any], num_parameters: int, needs_code: bool) -> str:
    """The text of a model card; `needs_code`: whether loading the model takes trust_remote_code=True."""
    start = checkpoint.state.get("began_from")
    source = Path(start) if start else checkpoint.path
    facts = {"library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["protein", "biology"]}
    head = "".join(f"{name}: {json.dumps(value)}\n" for name, value in facts.items())
    if (licence := licence_in(source)) is not None:
        head = f"license: {licence}\n{head}"
    if start is not None:
        head += f"base_model: {json.dumps(source.name)}\n"
    trust = ", trust_remote_code=True" if needs_code else ""
    lines = [f"- {line}" for line in _lines(checkpoint, config, num_parameters, start)]
    text = f"""---
{head}---

# A protein masked language model

{chr(10).join(lines)}

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForMaskedLM.from_pretrained("."{trust}).eval()
logits = model(**tokenizer("MKTAYIAKQR", return_tensors="pt")).logits
```

Residues may be spaced or not, in either case; each becomes one token.
"""
    return text.encode("utf-8", "backslashreplace").decode()  # a path may not be valid Unicode


def _lines(checkpoint: Checkpoint, config: Mapping[str, Any], num_parameters: int,
           start: str | None) -> Iterator[str]:
    """The facts on a model and its training; `start`: the weights that training began from, if any."""
    said, progress = checkpoint.state.get("config", {}), checkpoint.state.get("progress", {})
    yield (f"{config['num_layers']} layers of {config['hidden_size']}, {config['num_attention_heads']} heads, "
           f"{num_parameters:,} parameters")
    if start is not None:
        yield f"trained on from the weights in {Path(start).name}"
    if not progress.get("iteration"):
        yield f"written from {checkpoint.path.name}; what it was trained on is not known here"
        return
    if said.get("data_path"):
        yield f"trained on {' '.join(Path(str(word)).name for word in said['data_path'])}"  # no paths of the machine
    rows = f"{progress['iteration']:,} steps over {progress['consumed_samples']:,} rows"
    if isinstance(length := said.get("seq_length"), int):
        rows += f" of {length:,} positions: at most {progress['consumed_samples'] * length:,} residues"
    yield rows
    is_averaged = checkpoint.state.get("is_averaged", False)
    if is_averaged:
        yield f"the weights are the exponential average of those of the steps, of decay {said.get('ema')}"
    for kind, losses in _losses(checkpoint.path.parent / METRICS_FILE, checkpoint.iteration).items():
        split, _, corpus = kind.partition("/")
        if split != "train" and split.endswith(OF_AVERAGE) is not is_averaged:
            continue
        name = loss_name(f"{split.removesuffix(OF_AVERAGE)}/{corpus}")
        before = f", {losses[0]:.4f} before the first" if 0 in losses else ""
        step = max(losses)
        yield f"{name} {losses[step]:.4f} nats a masked residue after {step:,} steps{before}"


def _losses(metrics: Path, iteration: int) -> dict[str, dict[int, float]]:
    """The losses up to an iteration, as {kind of record: {iteration: loss}}, measured on the same data as the last."""
    found: dict[str, dict[int, float]] = {}
    with suppress(OSError):
        records = [record for record in read_records(metrics) if record["iteration"] <= iteration]
        for kind in dict.fromkeys(record["kind"] for record in records):
            for record in evaluations_of(records, kind)[0]:
                if isinstance(loss := record.get("loss"), float):
                    found.setdefault(kind, {})[record["iteration"]] = loss
    return found
