"""Subspaces, interventions, sites, positions, and the engine that runs and trains them on a model.

Knows no other room.
"""
