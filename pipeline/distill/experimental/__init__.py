"""Options from related work that are off by default, a file each. What the model itself must know of them stays in `mllm`, which may
not import this package.
"""
