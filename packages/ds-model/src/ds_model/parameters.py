"""How many parameters a configuration describes, in closed form: nothing is built."""

from functools import cache
from math import prod
from typing import NamedTuple

from ds_model.checkpoint.layout import Transform, layout
from ds_model.config import ModelConfig


class ParameterCounts(NamedTuple):
    """Numbers of values.

    Attributes:
        main: the model without its MTP modules and router biases [V3: 671,026,404,352].
        router_bias: the main model's balancing biases, which no gradient reaches [14,848].
        mtp: the MTP modules with their own router biases, without the embedding and the head
            that they share with the main model [11.6 billion].
        active: of `main`, what multiplies one token, MTP apart [36.6 billion].
    """

    main: int
    router_bias: int
    mtp: int
    active: int


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count from the released layout.

    Active are the parameters of the main model that take part in the products of one token:
    everything except the routed experts that it is not sent to (all but `num_experts_per_tok` of
    each layer) and except the embedding table, of which it reads one row. A tied table is the
    head as well, and then counts. This gives 36.6 billion for V3, 20.9 for V2 and 2.45 for
    V2-Lite, where the papers say 37, 21 and 2.4.

    Args:
        config: any valid configuration.

    Returns:
        The four counts, exact.
    """
    totals = {"main": 0, "router_bias": 0, "mtp": 0}
    idle = 0
    for entry in layout(config):
        totals[entry.part] += entry.size
        if entry.part != "main":
            continue
        if entry.path == "embed_tokens.embeddings" and not config.tie_word_embeddings:
            idle += entry.size
        elif entry.transform in (Transform.EXPERTS, Transform.EXPERTS_GATE_UP):
            experts = config.n_routed_experts or 0
            idle += (experts - (config.num_experts_per_tok or 0)) * prod(entry.shape[1:])
    return ParameterCounts(**totals, active=totals["main"] - idle)


class PartParameters(NamedTuple):
    """Numbers of values in one part of the model.

    Attributes:
        shared: what every token is multiplied by.
        experts: all routed experts together.
    """

    shared: int
    experts: int


@cache
def parameters_by_part(config: ModelConfig) -> dict[str, PartParameters]:
    """Count each part apart: "embed_tokens", "blocks.0" and on, "norm", "lm_head", "mtp.0" and on.

    The parts are those of arXiv 2412.19437, section 2.

    Args:
        config: any valid configuration.

    Returns:
        The counts, router biases among them, exact. A tied head is no part of its own.
    """
    found: dict[str, PartParameters] = {}
    for entry in layout(config):
        names = entry.path.split(".")
        name = ".".join(names[:2]) if names[0] in ("blocks", "mtp") else names[0]
        shared, experts = found.get(name, PartParameters(0, 0))
        if entry.transform in (Transform.EXPERTS, Transform.EXPERTS_GATE_UP):
            experts += entry.size
        else:
            shared += entry.size
        found[name] = PartParameters(shared, experts)
    return found
