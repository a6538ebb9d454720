"""A network and the places inside it: its blocks, batches of inputs, sites found in it, and runs with edits.

Knows core. Only `model/backbone.py` imports nnsight.
"""
