"""Distributed alignment search: causal models, counterfactuals, searches, sweeps and their scores.

Knows core.
"""
