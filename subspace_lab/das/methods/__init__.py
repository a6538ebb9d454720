"""Methods that find the subspaces of causal variables, one file each. Baselines and controls are methods too.

To add a method, write a frozen dataclass that derives from `Method`, in its own file here or in your own code. A sweep
runs the methods in its list; there is no registry. This example takes the direction of a logistic probe's weights:

    @dataclass(frozen=True)
    class MyProbe(Method):
        steps: int = 100

        def seeds(self, asked):
            return [0]  # nothing is random: one run is enough

        def learner(self, problem):
            found = {}
            for name, site in problem.sites.items():
                weights = fit_probe(problem.states(name), problem.values(name), self.steps)  # (1, width)
                found[name] = (site, FixedSubspace(weights / weights.norm()))
            return Learner(found)
"""

from subspace_lab.das.methods.boundless import BoundlessDAS
from subspace_lab.das.methods.das import DAS
from subspace_lab.das.methods.difference_of_means import DifferenceOfMeans
from subspace_lab.das.methods.full_vector import FullVector
from subspace_lab.das.methods.kmeans import KMeans
from subspace_lab.das.methods.lda import LDA
from subspace_lab.das.methods.mask import Mask
from subspace_lab.das.methods.mdas import MDAS
from subspace_lab.das.methods.method import Learner, Method, Problem
from subspace_lab.das.methods.path_patching import PathPatching
from subspace_lab.das.methods.pca import PCA
from subspace_lab.das.methods.probe import Probe
from subspace_lab.das.methods.random_subspace import RandomSubspace
from subspace_lab.das.methods.revnet import RevNet

__all__ = [
    "DAS",
    "LDA",
    "MDAS",
    "PCA",
    "BoundlessDAS",
    "DifferenceOfMeans",
    "FullVector",
    "KMeans",
    "Learner",
    "Mask",
    "Method",
    "PathPatching",
    "Probe",
    "Problem",
    "RandomSubspace",
    "RevNet",
]
