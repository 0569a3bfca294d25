"""Reads and checks the files that a user hands over, and splits the sessions into training, validation and test. It imports
`core` only, and neither PyTorch nor a model.
"""
