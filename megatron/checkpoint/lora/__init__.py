"""Low-rank adapters on the disk: in the files of peft, and merged into the weights."""
