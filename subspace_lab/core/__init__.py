"""The method itself: subspaces, interventions, sites, positions, and their files.

Knows no other room.
"""
