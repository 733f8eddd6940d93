"""Vocabulary, tokenizer, indexed files, and which documents are for training, validation and test."""
