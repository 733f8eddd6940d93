"""The flags that say what is to be learnt: the files of a task, and where sequence and label stand in them."""

from dataclasses import dataclass
from pathlib import Path

from megatron.config.declaration import flag
from megatron.errors import ConfigError
from megatron.finetune.tasks import LABEL_KEYS, LABEL_KINDS, SEQUENCE_KEYS, Task, split_files, task_of


@dataclass(frozen=True)
class TaskConfig:
    """The files of a task and their labels."""

    data: str = flag(None, "folder of the task's files, as TAPE names them (TASK_train.lmdb) or train.csv.gz, "
                     "valid.jsonl, …, of each any readable kind")
    train_data: str = flag(None, "file to train on, in place of --data: LMDB, JSON, CSV, TSV, Parquet or Arrow")
    valid_data: str = flag(None, "file that chooses the best of several evaluations")
    test_data: tuple[str, ...] = flag((), "files to evaluate at the end, each told by its name", nargs="+")
    sequence_key: str = flag(None, f"key or column of the sequence (default: the first of {', '.join(SEQUENCE_KEYS)})")
    label_key: str = flag(None, "key or column of the label (default: the task's, or the first of "
                          f"{', '.join(LABEL_KEYS)})")
    mask_key: str = flag(None, "key or column that has 1 for each residue that counts and 0 for the others (default: "
                         "mask or valid_mask, where there is one)")
    label_kind: str = flag(None, "what labels are: a number, a class, several classes (a list, or parted by ;), a "
                           "class of each residue, contacts by coordinates (default: told from the labels; numbers are "
                           "taken for numbers)", choices=LABEL_KINDS)
    class_weights: str = flag("none", "balanced: rare classes count more, so that all count alike together",
                              choices=("none", "balanced"))


def task_and_files(name: str, config: TaskConfig) -> tuple[Task, dict[str, str]]:
    """The task of that name with its files by part, `train` first; raises ConfigError or DataError."""
    task = task_of(name, sequence_key=config.sequence_key, label_key=config.label_key, mask_key=config.mask_key,
                   label_kind=config.label_kind)
    named = {"--train-data": config.train_data, "--valid-data": config.valid_data, "--test-data": config.test_data}
    given = " and ".join(flag_name for flag_name, value in named.items() if value)
    if config.data is not None:
        if given:
            raise ConfigError(f"--data {config.data} and {given} exclude each other; give the folder or the files")
        return task, split_files(task, config.data)
    if config.train_data is None:
        raise ConfigError("--data is missing; give the folder of the task's files, or --train-data FILE")
    files = {"train": config.train_data} | ({"valid": config.valid_data} if config.valid_data else {})
    for path in config.test_data:
        part = "test" if len(config.test_data) == 1 else Path(path).name.split(".")[0]
        if part in files:
            raise ConfigError(f"--test-data names two files {part}, or one like another part; rename one of them")
        files[part] = path
    return task, files
