"""The masked language model on flat packed tokens."""
