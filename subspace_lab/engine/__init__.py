"""Training and evaluating edits over a data set, without computing anything twice.

Knows model and core.
"""

from subspace_lab.engine.frozen_past import FrozenPast
from subspace_lab.engine.plain import PlainEngine
from subspace_lab.engine.protocol import Engine
from subspace_lab.engine.readouts import Readout
from subspace_lab.engine.training import TrainingConfig, shuffled_rows, train

__all__ = ["Engine", "FrozenPast", "PlainEngine", "Readout", "TrainingConfig", "shuffled_rows", "train"]
