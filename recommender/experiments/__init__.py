"""Trains many models and compares them: `tpad evaluate` and `tpad ablate`. Only the command line may import this package."""
