"""Vocabulary, tokenizer, indexed datasets, and the split into training, validation and test documents."""
