"""Losses and bounds on mutual information, as pure functions and small networks over tensors. It imports nothing of ours and
knows neither items nor phases.
"""
