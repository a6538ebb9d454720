"""Representation finetuning (Wu et al. 2024, arXiv 2404.03592), with the method names of PEFT."""

from subspace_lab.reft.adapters_hub import from_adapters
from subspace_lab.reft.config import METHODS, ReftConfig
from subspace_lab.reft.control_vectors import load_control_vector, save_control_vector
from subspace_lab.reft.data import PromptCollator, tokenise
from subspace_lab.reft.finetune import FinetuneInterrupted, finetune
from subspace_lab.reft.model import ReftModel, get_reft_model
from subspace_lab.reft.pyreft import from_pyreft, to_pyreft
from subspace_lab.reft.suggesting import suggest

__all__ = [
    "METHODS",
    "FinetuneInterrupted",
    "PromptCollator",
    "ReftConfig",
    "ReftModel",
    "finetune",
    "from_adapters",
    "from_pyreft",
    "get_reft_model",
    "load_control_vector",
    "save_control_vector",
    "suggest",
    "to_pyreft",
    "tokenise",
]
