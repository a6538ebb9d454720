"""What a result means: geometry, controls, illusions, verdicts and pictures.

Knows das, reft and core; tasks are handed in, never imported.
"""
