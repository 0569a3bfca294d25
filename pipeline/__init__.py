"""Turns a catalogue and its sessions into item embeddings: `distill` trains the model, `export` runs it over every item.

Imports run one way, `core <- data <- mllm <- {distill, export}`; `objectives` is a leaf, `run_folder.py` stands over core and
data, and nothing here imports `recommender`. A test enforces it (tests/test_layout.py).
"""
