"""`tpad report`: one HTML file about a run. It reads what other commands have published, and may import `serving`, `metrics` and what
these import.
"""
