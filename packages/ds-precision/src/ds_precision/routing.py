"""Choosing experts by the compiled operation (arXiv 2412.19437, eq. 13-16), and its gradient.

Letters: T tokens, E experts, K experts a token.
"""

from __future__ import annotations

import tensorflow as tf

from ds_precision.kernels import operations

# Keeps weights finite where all chosen scores are 0, as the reference does.
SMALL = 1e-20


def fused_routing(
    scores: tf.Tensor,
    bias: tf.Tensor | None,
    chosen: int,
    groups: int,
    best_groups: int,
    two_best: bool,
    normalize: bool,
    factor: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Take the top K of the biased scores within the best groups, and weigh them without bias.

    Args:
        scores: `[T, E]` float32.
        bias: `[E]` float32, added for the choice alone; `None` for none.
        chosen: K.
        groups: number of equal groups that the experts lie in.
        best_groups: how many of them may be chosen from.
        two_best: a group is worth the sum of its two best scores, not its best one.
        normalize: divide the weights by their sum.
        factor: multiplies the weights.

    Returns:
        Indices `[T, K]` int32, the first of equals, and weights `[T, K]` float32, which carry
        the gradient.

    Raises:
        tf.errors.InvalidArgumentError: sizes do not fit.
    """
    indices, gates = operations().ds_route(
        scores=scores,
        bias=tf.zeros([0]) if bias is None else bias,
        chosen=chosen,
        groups=groups,
        best_groups=best_groups,
        two=two_best,
        normalize=normalize,
        scale=factor,
    )
    for found in (indices, gates):
        found.set_shape([scores.shape[0], chosen])
    return indices, gates


@tf.RegisterGradient("DsRoute")
def _routing_gradient(op: tf.Operation, _: tf.Tensor, dgates: tf.Tensor) -> list[tf.Tensor | None]:
    scores, indices = op.inputs[0], op.outputs[0]
    # Who gathered gates, as ranks that exchange them do, gives rows of a gradient.
    slopes = tf.convert_to_tensor(dgates) * op.get_attr("scale")
    if op.get_attr("normalize"):
        taken = tf.gather(scores, indices, batch_dims=1)
        total = tf.reduce_sum(taken, axis=-1, keepdims=True) + SMALL
        slopes = (slopes - tf.reduce_sum(slopes * taken, axis=-1, keepdims=True) / total) / total
    rows = tf.broadcast_to(tf.range(tf.shape(indices)[0])[:, None], tf.shape(indices))
    places = tf.stack([rows, indices], axis=-1)
    return [tf.scatter_nd(places, slopes, tf.shape(scores)), None]
