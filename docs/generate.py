"""Pages that the code itself tells: every flag, every tool's help, every format of files; and two that lie elsewhere.

`conf.py` calls `write_pages` at each build; what it writes is ignored by git, so that no text stands twice.
"""

import ast
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from pathlib import Path

import numpy as np

from megatron.checkpoint.convert.formats import FORMATS, WEIGHTS_ALONE
from megatron.config import Config
from megatron.config.declaration import can_be_off, flag_name, is_switch, shown
from megatron.config.lora import LoraConfig
from megatron.config.reading.megatron_flags import ALWAYS_SO, REFUSED
from megatron.config.reading.parser import value_name
from megatron.config.reading.presets import PRESETS
from megatron.config.reading.sources import Sources
from megatron.config.telling.completion import SHELLS
from megatron.data.corpus.indexed import DTYPES, MMAP_HEADER_BYTES, MMAP_MAGIC, TNT_HEADER_BYTES, TNT_MAGIC
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.finetune.flags import FinetuneConfig, TaskConfig

# Pages of the repository that lie outside docs, and what they are called here.
ELSEWHERE = {"protein_tools/README.md": "proteins", "benchmarks/RESULTS.md": "measurements"}
CHANGES = {"arithmetic": "refused", "vocabulary": "refused", "dropout": "reported", "samples": "reported",
           "course": "reported", "nothing": "free"}
# Where the docstring of a module describes files: a title for each.
DESCRIBED = {
    "The folder of a run": "megatron.checkpoint.store", "A checkpoint's manifest": "megatron.checkpoint.manifest",
    "A checkpoint in whole files": "megatron.checkpoint.whole", "metrics.jsonl": "megatron.train.observation.events",
    "A contact head beside a checkpoint": "megatron.checkpoint.contact_head",
    "Adapters": "megatron.checkpoint.lora.peft_files",
    "Megatron-LM v2 and ProteinLM": "megatron.checkpoint.convert.megatron_v2.places",
    "Folders of transformers": "megatron.checkpoint.convert.families.hf",
    "Tokenizers of transformers": "megatron.data.corpus.tokenizer_folder",
    "Files of fair-esm": "megatron.checkpoint.convert.families.esm",
    "Current Megatron-LM, a file a rank": "megatron.checkpoint.convert.megatron_core.ranks",
    "Current Megatron-LM, distributed": "megatron.checkpoint.convert.megatron_core.distributed",
    "Indexed data": "megatron.data.corpus.indexed", "Row indices": "megatron.data.rows.row_cache",
    "Files of flags": "megatron.config.reading.files"}


def write_pages(root: Path, folder: Path) -> None:
    """Write the pages into a folder, those whose text is another."""
    folder.mkdir(exist_ok=True)
    os.environ["COLUMNS"] = "100"  # of argparse
    pages = {"flags": flags_page(), "tools": tools_page(root), "presets": presets_page(), "formats": formats_page(root)}
    pages |= {name: (root / path).read_text(encoding="utf-8") for path, name in ELSEWHERE.items()}
    for name, text in pages.items():
        _write(folder / f"{name}.md", text.encode())
    for picture in re.findall(r"!\[[^]]*\]\(([\w.]+)\)", pages["measurements"]):
        _write(folder / picture, (root / "benchmarks" / picture).read_bytes())


def flags_page() -> str:
    """Every flag of pretrain_tape.py, of preprocessing and of fine-tuning that is a field of a dataclass."""
    lines = ["# Flags", "", "As the code declares them in `megatron/config/`, `megatron/data/preprocess/flags.py` and "
             "`megatron/finetune/flags.py`. A switch `--[no-]x` is set by `--x` and unset by `--no-x`. The last column "
             "says what happens when a run resumes with another value than the checkpoint's. It is *refused* if it "
             "makes another function of the same weights (a vocabulary only if its tokens differ). It is honoured and "
             "*reported* in a line if it changes rows, masks or steps. Otherwise it is *free*. If the column is empty, "
             "the flag is not compared.",
             "", f"`--help` lists the commonest, `--help-all` all of them; `--completion` with {', '.join(SHELLS)} "
             "prints a script with which that shell completes them.", "", "## pretrain_tape.py", ""]
    for section in (Sources, *(type(section) for _, section in Config().sections())):
        lines += _section(section)
    lines += ["### Always so", "", "Flags of Megatron-LM that are accepted and change nothing.", "",
              *_table(("flag", "why"), ([_code(name), _text(why)] for name, why in ALWAYS_SO.items())), "",
              "### Refused", "", "Flags of Megatron-LM that stop the program.", "",
              *_table(("flag", "why"), ([_code(name), _text(why)] for name, why in REFUSED.items())), ""]
    for title, sections in (("tools/preprocess_data.py", (PreprocessConfig,)),
                            ("tools/finetune.py", (TaskConfig, FinetuneConfig, LoraConfig))):
        lines += [f"## {title}", ""]
        for section in sections:
            lines += _section(section)
    return "\n".join(lines)


def tools_page(root: Path) -> str:
    """What each of the other tools says under --help."""
    lines = ["# Tools", "", "The output of `--help` of each tool. The flags of `tools/preprocess_data.py` and "
             "`tools/finetune.py` are on [the page of flags](flags.md).", ""]
    for path in sorted((root / "tools").glob("*.py")):
        module = importlib.import_module(f"tools.{path.stem}")
        made = getattr(module, "parser", None) or getattr(module, "_parser", None) or (
            getattr(module, "predict_parser", None))
        if made is not None:
            parser = made()
            parser.prog = f"python tools/{path.name}" + " predict" * (made.__name__ == "predict_parser")
            lines += [f"## tools/{path.name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def presets_page() -> str:
    """What each preset sets."""
    lines = ["# Presets", "", "What each preset sets, including what it inherits from others; everything else has its "
             "default. Sources are given in the files, `megatron/config/presets/*/NAME.toml`.", ""]
    names = {item.name: flag_name(item) for _, section in Config().sections() for item in fields(section)}
    for preset, values in PRESETS.items():
        words = [names[name] if value is True else f"--no-{names[name][2:]}" if value is False
                 else f"{names[name]} {shown(value)}" for name, value in values.items()]
        lines += [f"## {preset}", "", "```text", *words, "```", ""]
    return "\n".join(lines)


def formats_page(root: Path) -> str:
    """The files that are read and written, as the modules that do it describe them."""
    lines = ["# File formats", "", "As the modules that read and write them describe them.", "", "## Checkpoints", "",
             *_table(("`--to`", "optimizer's state", "module"),
                     ([_code(name), "no" if name in WEIGHTS_ALONE else "yes", _code(form.__name__)]
                      for name, form in FORMATS.items())), ""]
    for title, module in DESCRIBED.items():
        lines += [f"## {title}", "", *described(root, module)]
        if title == "Indexed data":
            lines += [*_table(("layout", "first bytes", "header"), (
                ["mmap", _code(MMAP_MAGIC), f"{MMAP_HEADER_BYTES} bytes"],
                ["tnt", _code(TNT_MAGIC), f"{TNT_HEADER_BYTES} bytes"])), "",
                *_table(("type of ids, as the header codes it", "dtype"),
                        ([str(code), _code(np.dtype(kind).name)] for code, kind in DTYPES.items())), ""]
    lines += ["## Vocabularies", "", "The line of a token is its id, from 0.", ""]
    for name in ("iupac", "esm", "protbert"):
        vocab = Vocab.from_file(name)
        tokens = (f"{_code(token)} {number}" for number, token in enumerate(vocab.tokens))
        lines += [f"{_code(name)}: {', '.join(tokens)}", ""]
    return "\n".join(lines)


def described(root: Path, module: str) -> Iterator[str]:
    """The docstring of a module, which is not imported for it: paragraphs, and as they stand those that are set out."""
    path = root / (module.replace(".", "/") + ".py")
    path = path if path.exists() else path.with_suffix("") / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if text is None:
        raise ValueError(f"{path} has no docstring to show")
    for paragraph in text.split("\n\n"):
        is_set_out = re.search(r"\S   +\S|^ |^\S+$", paragraph, re.MULTILINE)
        yield from ("```text", paragraph, "```", "") if is_set_out else (_text(paragraph), "")


def _section(section: type) -> Iterator[str]:
    yield from (f"### {section.__name__.removesuffix('Config')}", "", _text(section.__doc__ or ""), "")
    items = [item for item in fields(section) if not item.metadata["is_hidden"]]
    yield from _table(("flag", "default", "what it is", "on resuming"), map(_row, items))
    yield ""


def _row(item: Field) -> list[str]:
    meta, name = item.metadata, flag_name(item)
    switch = f"--[no-]{name[2:]}" if can_be_off(item) else name
    names = [_code(switch if is_switch(item) else f"{name} {value_name(item)}"), *map(_code, meta["aliases"])]
    choices = [str(choice) for choice in meta["choices"] or ()]
    default = ("on" if item.default else "off") if is_switch(item) else (
        "" if item.default in (None, ()) else _code(shown(item.default)))
    text = _text(meta["help"]) + (f"; one of {', '.join(map(_code, choices))}" if choices else "")
    text += f" ({meta['check'][1]})" if meta["check"] else ""
    return [", ".join(names), default, text, CHANGES.get(meta["changes"], "")]


def _table(heads: Iterable[str], rows: Iterable[list[str]]) -> Iterator[str]:
    heads = list(heads)
    yield from (f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}")
    yield from (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def _text(plain: str) -> str:
    """Words of help as Markdown: flags as code, and what is code already; nothing else that Markdown would read."""
    parts = " ".join(plain.split()).split("`")
    return "`".join(part if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(plain: str) -> str:
    parts = re.split(r"(?<![\w-])(--[a-zA-Z][\w-]*)", plain)
    return "".join(_code(part) if number % 2 else re.sub(r"([<>*_\[\]])", r"\\\1", part)
                   for number, part in enumerate(parts))


def _code(text: object) -> str:
    return f"`{text}`"


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
