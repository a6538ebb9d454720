"""Representation finetuning (Wu et al. 2024, arXiv 2404.03592) over the core, with PEFT's verbs."""

from subspace_lab.reft.config import METHODS, ReftConfig
from subspace_lab.reft.data import PromptCollator, tokenise
from subspace_lab.reft.finetune import finetune
from subspace_lab.reft.model import ReftModel, get_reft_model

__all__ = [
    "METHODS",
    "PromptCollator",
    "ReftConfig",
    "ReftModel",
    "finetune",
    "get_reft_model",
    "tokenise",
]
