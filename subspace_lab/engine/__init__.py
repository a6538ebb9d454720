"""Training and evaluating edits over a data set without computing anything twice.

Knows model and core.
"""
