"""Representation finetuning: the verbs of PEFT over the interventions of core.

Knows core.
"""
