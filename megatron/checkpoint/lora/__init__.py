"""Low-rank adapters on the disk: in the files of peft."""
