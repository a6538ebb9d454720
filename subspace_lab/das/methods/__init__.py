"""Methods that find the subspaces of causal variables, a file each. Baselines and controls are methods too.

To add one: a frozen dataclass that derives from `Method`, in a file of its own here or in your own code. A sweep runs
the methods in the list that it is given; nothing has to be registered.
"""

from subspace_lab.das.methods.das import DAS
from subspace_lab.das.methods.difference_of_means import DifferenceOfMeans
from subspace_lab.das.methods.full_vector import FullVector
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.methods.pca import PCA
from subspace_lab.das.methods.random_subspace import RandomSubspace

__all__ = [
    "DAS",
    "PCA",
    "DifferenceOfMeans",
    "FullVector",
    "Learner",
    "Method",
    "Problem",
    "RandomSubspace",
]
