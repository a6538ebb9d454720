"""subspace_lab: where in a model does a variable live, does it do anything there, and can it be edited?"""
