"""Mixture of experts of DeepSeek-V3: experts, routers, balance."""

from ds_moe.balance import max_violation, sequence_balance_loss, update_biases
from ds_moe.config import MoEConfig
from ds_moe.exchange import ExpertRanks
from ds_moe.moe import MixtureOfExperts
from ds_moe.placement import Placement, rebalance_experts
from ds_moe.router import Router, Routing
from ds_moe.swiglu import SwiGLU

__all__ = [
    "ExpertRanks",
    "MixtureOfExperts",
    "MoEConfig",
    "Placement",
    "Router",
    "Routing",
    "SwiGLU",
    "max_violation",
    "rebalance_experts",
    "sequence_balance_loss",
    "update_biases",
]
