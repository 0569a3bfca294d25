"""Turns one item into one vector: prompts, image and text tokens, the backbone and its heads. It knows no training loop, and may
import `core` and `data` only.
"""
