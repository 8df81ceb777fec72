"""Corpora to batches: sources, tokenizers, packed rows and the order they are read in."""
