"""`tpad evaluate` and `tpad ablate`: train many models and compare them. Nothing but the command line may import this package."""
