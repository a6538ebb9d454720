"""A network and its inside: its blocks, batches of inputs, resolved sites, and runs with edits.

Knows core. Only `model/backbone.py` imports nnsight.
"""
