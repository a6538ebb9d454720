"""Representation finetuning (Wu et al. 2024, arXiv 2404.03592) over the core, with PEFT's verbs."""

from subspace_lab.reft.config import METHODS, ReftConfig
from subspace_lab.reft.data import PromptCollator, tokenise
from subspace_lab.reft.finetune import finetune
from subspace_lab.reft.model import ReftModel, get_reft_model
from subspace_lab.reft.storage import from_pretrained, load_adapter, push_to_hub, save_pretrained

__all__ = [
    "METHODS",
    "PromptCollator",
    "ReftConfig",
    "ReftModel",
    "finetune",
    "from_pretrained",
    "get_reft_model",
    "load_adapter",
    "push_to_hub",
    "save_pretrained",
    "tokenise",
]
