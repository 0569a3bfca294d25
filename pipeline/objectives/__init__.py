"""Losses and bounds on mutual information, as pure functions and small networks over tensors. The package imports no other part of tpad and
knows neither items nor phases.
"""
