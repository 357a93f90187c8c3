"""How fast a cluster computes, reads memory and exchanges; the paper's (arXiv 2412.19437, 3.1)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_train.errors import TrainConfigError

Precision = Literal["float32", "bfloat16", "fp8"]
Positive = Annotated[float, Field(gt=0)]


class Cluster(BaseModel):
    """Devices in nodes. Speeds are those that good programs reach, not those of a data sheet.

    Attributes:
        name: what it is called.
        memory: of a device [GiB].
        products: what large matrix products reach, by precision [TFLOP/s].
        attention: what attention's core reaches forwards [TFLOP/s].
        attention_backward: and backwards.
        bandwidth: what passes over memory reach [GB/s].
        devices_per_node: that are joined by fast links.
        near: what a device sends to those of its node [GB/s, one direction].
        far: what it sends to other nodes.
        exchange_share: of a device's compute units, while it exchanges and computes at once.
        kept: what a whole step keeps of its parts' speeds: the rest goes to starting, waiting,
            uneven experts and all that is not counted.
        price: of an hour of a device [dollars]; 0 if it has none.
        source: where the numbers come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    memory: Positive
    products: dict[Precision, Positive]
    attention: Positive
    attention_backward: Positive
    bandwidth: Positive
    devices_per_node: Annotated[int, Field(gt=0)] = 8
    near: Positive = 1.0
    far: Positive = 1.0
    exchange_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    kept: Annotated[float, Field(gt=0, le=1)] = 1.0
    price: Annotated[float, Field(ge=0)] = 0.0
    source: str = ""


# Of a step's parts' speeds; fitted once, so that the paper's own run takes the time that the paper
# says. The other published runs are then predicted; see `published`.
KEPT = 0.74

_H800 = Cluster(
    name="H800, 8 a node",
    memory=80,
    products={"bfloat16": 700, "fp8": 1250},
    attention=600,
    attention_backward=480,
    bandwidth=2700,
    near=155,
    far=45,
    exchange_share=20 / 132,
    kept=KEPT,
    price=2,
    source=(
        "products: README of DeepGEMM (FP8, the shapes of V3), BF16 in proportion to the peak; "
        "attention: arXiv 2407.08608 (causal, 4k); links: README of DeepEP; 20 of 132 units "
        "exchange and the price: arXiv 2412.19437, sections 3.2.2 and 1"
    ),
)
_H100 = {
    "name": "H100, 8 a node",
    "near": 320.0,
    "price": 2.5,
    "source": "as h800, with links of 450 GB/s within a node; the price is a guess",
}
CLUSTERS: dict[str, Cluster] = {"h800": _H800, "h100": _H800.model_copy(update=_H100)}
"""Known clusters by name."""


def read_cluster(name: str) -> Cluster:
    """Return a known cluster, or that of a TOML file with `Cluster`'s fields.

    Raises:
        TrainConfigError: neither; says what would be right.
    """
    if name in CLUSTERS:
        return CLUSTERS[name]
    path = Path(name)
    if not path.exists():
        known = ", ".join(CLUSTERS)
        raise TrainConfigError(
            f"cluster is {name!r}; it must be one of {known}, or a TOML file such as `ds-train "
            "plan --measure` prints"
        )
    try:
        return Cluster.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TrainConfigError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise TrainConfigError(f"{path}: {where}: {first['msg']}") from error


def as_toml(cluster: Cluster) -> str:
    """Return what `read_cluster` reads."""
    lines = []
    for name, value in cluster.model_dump().items():
        if isinstance(value, dict):
            inner = ", ".join(f"{key} = {number:g}" for key, number in value.items())
            lines.append(f"{name} = {{ {inner} }}")
        elif isinstance(value, str):
            lines.append(f"{name} = '{value}'")
        else:
            lines.append(f"{name} = {value:g}")
    return "\n".join(lines) + "\n"
