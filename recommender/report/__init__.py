"""Writes one HTML file about a run: `tpad report`. It reads published artifacts, and may import `serving`, `metrics` and
what these import.
"""
