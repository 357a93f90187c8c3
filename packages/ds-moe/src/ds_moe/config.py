"""What a mixture-of-experts layer is made of, under the names of the released `config.json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SCORING_FUNCS = ("sigmoid", "softmax")
TOPK_METHODS = ("noaux_tc", "greedy", "group_limited_greedy")


@dataclass(frozen=True)
class MoEConfig:
    """Sizes and rules of one layer [V3's values in brackets].

    Attributes:
        hidden_size: width of the residual stream [7168].
        moe_intermediate_size: inner width of one expert [2048].
        n_routed_experts: experts to choose from [256].
        num_experts_per_tok: experts that each token goes to [8].
        n_shared_experts: experts that every token goes to, as one of that many times the
            width [1]; 0 for none.
        n_group: groups that the experts are dealt into [8].
        topk_group: groups that one token may use [4].
        routed_scaling_factor: factor on the gates [2.5].
        norm_topk_prob: whether a token's gates are made to sum to one first [true].
        scoring_func: "sigmoid" (V3) or "softmax" (V2).
        topk_method: "noaux_tc" (V3: biased scores, a group counts by its best two),
            "group_limited_greedy" (V2: by its best one) or "greedy" (V2-Lite: no groups).
        initializer_range: standard deviation of fresh weights [0.006].
    """

    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in (
            "hidden_size",
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
        ):
            value = getattr(self, field)
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"{field} is {value!r}; it must be a positive integer")
        if self.n_shared_experts < 0:
            raise ValueError(f"n_shared_experts is {self.n_shared_experts}; it must be 0 or more")
        if self.scoring_func not in SCORING_FUNCS:
            raise ValueError(f"scoring_func is {self.scoring_func!r}; known: {SCORING_FUNCS}")
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"topk_method is {self.topk_method!r}; known: {TOPK_METHODS}")
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_group is {self.n_group}; it must divide n_routed_experts "
                f"({self.n_routed_experts})"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group is {self.topk_group}; it must be at most n_group ({self.n_group})"
            )
        if self.num_experts_per_tok > self.reachable_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; a token can reach only "
                f"{self.reachable_experts} experts ({self.topk_group} groups of "
                f"{self.experts_per_group})"
            )
        if self.topk_method == "noaux_tc" and self.experts_per_group < 2:
            raise ValueError(
                f"n_group is {self.n_group}; noaux_tc scores a group by its two best experts, "
                f"so a group needs at least 2 of the {self.n_routed_experts}"
            )

    @property
    def experts_per_group(self) -> int:
        """Experts in one group."""
        return self.n_routed_experts // self.n_group

    @property
    def reachable_experts(self) -> int:
        """Experts that one token can choose from once its groups are fixed."""
        if self.topk_method == "greedy":
            return self.n_routed_experts
        return self.topk_group * self.experts_per_group

    @property
    def has_router_bias(self) -> bool:
        """Whether the router carries the balancing bias of V3 (arXiv 2412.19437, eq. 16)."""
        return self.topk_method == "noaux_tc"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `MoEConfig(**values)` is equal."""
        return asdict(self)
