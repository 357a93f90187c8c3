"""One optimizer step on many ranks, as one compiled graph on each.

What a rank computes is what `TrainStep` computes, cut differently: its micro-batches through its
part of the model, in the order of the schedule; gradients summed over who holds the same weights;
then sums over all ranks of what belongs to the whole step: the gradient's norm, losses, loads.

Where a batch can't be dealt out evenly, micro-batches differ by a sequence. What is a mean over one
then counts by its sequences.

Shape letters: G sequences of this rank's share, N micro-batches, B sequences of a micro-batch, S
sequence, D hidden_size, L expert layers of the whole model, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import keras
import tensorflow as tf

from ds_model import CausalLM, ModelOutput
from ds_moe import Routing
from ds_precision import WeightGradients, defer_weight_gradients
from ds_train.config import TrainConfig
from ds_train.loss_scale import LossScale
from ds_train.losses import balance_loss, mtp_loss, next_token_loss
from ds_train.parallel.layout import Layout
from ds_train.parallel.schedules import Exchange, Slot, Work
from ds_train.parallel.update import Update
from ds_train.parallel.world import World
from ds_train.step import StepOutput, balance, clip_to, mtp_weight

_PARTS = ("cross_entropy", "mtp_cross_entropy", "balance_loss")


class ParallelStep:
    """The training step of one rank.

    Args:
        model: this rank's part.
        update: sums gradients and changes the weights.
        config: loss weights, clipping.
        layout: who holds what, and the schedule.
        world: this rank's.

    Attributes:
        compiled: `step` as a graph.
        scaling: what the loss is multiplied by, and whether steps are skipped.
    """

    def __init__(
        self,
        model: CausalLM,
        update: Update,
        config: TrainConfig,
        layout: Layout,
        world: World,
    ) -> None:
        self._model = model
        self._update = update
        self._config = config
        self._layout = layout
        self._world = world
        self._program = layout.schedule.programs()[world.place.pp]
        self.scaling = LossScale(config.train)
        self.compiled = tf.function(self.step, autograph=False)

    def step(self, tokens_GS: tf.Tensor, sizes: tuple[int, ...]) -> StepOutput:
        """Do one optimizer step.

        Args:
            tokens_GS: `[G, S + 1]` int32, static shape: this rank's share of the batch, the same
                for all ranks of one pipeline.
            sizes: sequences of each of its micro-batches.

        Returns:
            Losses are means and loads are sums over the whole batch, the same on all ranks.
        """
        iterations = tf.identity(self._update.optimizer.iterations)
        weight = mtp_weight(self._config, iterations)
        tokens_NBS = tf.split(tokens_GS, sizes)
        run = _Micros(
            self._model, self._config, self._layout, self._world, weight, self.scaling, tokens_NBS
        )
        for item in self._program:
            if isinstance(item, Exchange):
                run.exchange(item)
            else:
                run.compute(item)
        count = len(sizes) * self._world.mesh.data_ranks
        share = 1.0 / (count * tf.convert_to_tensor(self.scaling.value))
        reduced, squares = self._update.reduce(run.gradients)
        mine = tf.concat([[squares], run.parts, tf.reshape(run.loads, [-1])], axis=0)
        total = self._world.all.all_reduce(mine)
        squares, parts, loads = tf.split(total, [1, len(_PARTS), tf.size(run.loads)])
        loads = tf.reshape(loads, run.loads.shape)

        scalars = dict(zip(_PARTS, tf.unstack(parts / count), strict=True))
        table = self._config.loss
        scalars["loss"] = (
            scalars["cross_entropy"]
            + weight * scalars["mtp_cross_entropy"]
            + table.balance_alpha * scalars["balance_loss"]
        )
        norm = share * tf.sqrt(squares[0])
        scale = share * clip_to(norm, self._config.optimizer.clip_norm)
        optimizer = self._update.optimizer
        scalars["gradient_norm"] = norm
        scalars["learning_rate"] = tf.cast(optimizer.learning_rate, tf.float32)
        scalars["loss_scale"] = tf.identity(self.scaling.value)
        layers = zip(self._model.moe_layers, tf.unstack(loads), strict=True)
        here = [(layer, load) for layer, load in layers if layer.built]

        def update() -> None:
            self._update.apply(reduced, scale)
            built, load = [layer for layer, _ in here], [load for _, load in here]
            balance(built, load, self._config, iterations)

        # The same on all ranks. What they exchange stands outside the branch, where order holds.
        finite = tf.math.is_finite(norm) & tf.math.is_finite(scalars["loss"])
        scalars["applied"] = self.scaling.guarded(finite, update)
        self._update.share()
        self.scaling.adjust(finite)
        return StepOutput(scalars, loads)


class _Forward(NamedTuple):
    """What a forward pass leaves for its backward one.

    Attributes:
        tape: has seen it.
        source: what came in, `[B, S, D]`; None where tokens did.
        results: what gradients come back to: what goes out, then this part's own loss.
        later: where weights' gradients wait; None where they do not.
    """

    tape: tf.GradientTape
    source: tf.Tensor | None
    results: list[tf.Tensor]
    later: WeightGradients | None


class _Micros:
    """The micro-batches of one step, as they are traced.

    Attributes:
        gradients: one a weight of this rank: sums over micro-batches.
        parts: `[3]` float32: sums of the losses that arose here.
        loads: `[L, E]` float32: sums of the loads that arose here.
    """

    def __init__(
        self,
        model: CausalLM,
        config: TrainConfig,
        layout: Layout,
        world: World,
        mtp_weight: tf.Tensor,
        scaling: LossScale,
        tokens_NBS: Sequence[tf.Tensor],
    ) -> None:
        self._model = model
        self._world = world
        self._layout = layout
        self._mtp_weight = mtp_weight
        self._scaling = scaling
        self._balance_alpha = config.loss.balance_alpha
        self._recompute = config.train.recompute
        # Recomputed blocks run their forward pass within the backward one, all at once.
        self._split = layout.schedule.splits and self._recompute == "none"
        self._tokens = tokens_NBS
        mesh, table = world.mesh, config.train
        self._even = table.batch_size / (table.accumulation * mesh.data_ranks)
        self._weights: list[keras.Variable] = list(self._model.trainable_variables)
        self._at = {id(weight): i for i, weight in enumerate(self._weights)}
        self._sums: list[tf.Tensor | None] = [None] * len(self._weights)
        self._forwards: dict[Work, _Forward] = {}
        self._arrived: dict[Work, tf.Tensor] = {}
        self._leaving: dict[Work, tf.Tensor] = {}
        self._after: list[tf.Tensor] = []
        layers = self._model.moe_layers
        experts = layers[0].config.n_routed_experts if layers else 0
        self._places = self._places_of_layers()
        self.loads = tf.zeros([len(layers), experts])
        self.parts = tf.zeros([len(_PARTS)])

    @property
    def gradients(self) -> list[tf.Tensor]:
        """One a weight; zeros where no loss reaches it."""
        return [
            tf.zeros(weight.shape, weight.dtype) if total is None else total
            for total, weight in zip(self._sums, self._weights, strict=True)
        ]

    def compute(self, slot: Slot) -> None:
        """Do the works of a slot, after those of the slot before."""
        do = {"F": self._forward, "B": self._backward, "I": self._backward, "W": self._later}
        ends = [end for work in slot for end in do[work.kind](work)]
        self._after = ends

    def exchange(self, item: Exchange) -> None:
        """Give a neighbour what is ready for it, and take what it has."""
        sent = [self._widened(self._leaving.pop(work)) for work in item.send]
        rows = max(len(item.send), len(item.receive))
        sent += [tf.zeros(self._shape, self._dtype)] * (rows - len(sent))
        world = self._world
        place = world.place
        peer = world.mesh.rank(place._replace(pp=item.peer))
        pair = world.ranks(world.mesh.pair(world.rank, peer))
        received = tf.unstack(pair.swap(tf.stack(sent)))
        for work, tensor in zip(item.receive, received, strict=False):
            self._arrived[work] = tensor[: self._tokens[work.micro_batch].shape[0]]

    @property
    def _shape(self) -> list[int]:
        """Of what travels: both ways alike, so that of the largest micro-batch."""
        batch = max(tokens.shape[0] for tokens in self._tokens)
        return [batch, self._tokens[0].shape[1] - 1, self._model.config.hidden_size]

    def _widened(self, tensor: tf.Tensor) -> tf.Tensor:
        missing = self._shape[0] - tensor.shape[0]
        return tf.pad(tensor, [[0, missing], [0, 0], [0, 0]]) if missing else tensor

    @property
    def _dtype(self) -> str:
        return self._model.compute_dtype

    def _places_of_layers(self) -> dict[int, int]:
        """Return the place of each block among the layers with experts."""
        moe = [i for i, block in enumerate(self._model.blocks) if block.moe]
        return {block: place for place, block in enumerate(moe)}

    def _wait(self, tensor: tf.Tensor) -> tf.Tensor:
        """Return the tensor, once the slot before is done: what is made of it runs after that."""
        with tf.control_dependencies(self._after):
            return tf.identity(tensor)

    def _forward(self, work: Work) -> list[tf.Tensor]:
        layout, model = self._layout, self._model
        blocks = layout.blocks[work.stage]
        tokens_BS = self._wait(self._tokens[work.micro_batch])
        ids_BS = tokens_BS[:, :-1]
        before = work._replace(stage=work.stage - 1)
        source = None if work.stage == 0 else self._wait(self._arrived.pop(before))
        later = WeightGradients() if self._split else None
        with tf.GradientTape() as tape:
            if source is None:
                h = model.embed_tokens(ids_BS)
            else:
                tape.watch(source)
                h = source
            with _deferring(later):
                h, routings = model.run_blocks(h, None, self._recompute, blocks)
                places = [self._places[block] for block in blocks if block in self._places]
                results = []
                if work.stage == layout.last_stage:
                    output = model.finish(h, ids_BS, mtp=bool(model.mtp), recompute=self._recompute)
                    routings = (*routings, *output.routings)
                    places += range(len(self._places), len(model.moe_layers))
                    losses = self._losses(output, tokens_BS)
                else:
                    results.append(h)
                    losses = [tf.constant(0.0), tf.constant(0.0)]
                losses.append(balance_loss(routings, tf.shape(tokens_BS)[0]))
                if (share := tokens_BS.shape[0] / self._even) != 1:
                    losses = [share * loss for loss in losses]
                loss = losses[0] + self._mtp_weight * losses[1] + self._balance_alpha * losses[2]
                results.append(self._scaling.scaled(loss))
        self._forwards[work] = _Forward(tape, source, results, later)
        self._count(losses, places, routings)
        if work.stage != layout.last_stage:
            self._leave(work, results[0])
        return results

    def _losses(self, output: ModelOutput, tokens_BS: tf.Tensor) -> list[tf.Tensor]:
        return [next_token_loss(output.logits, tokens_BS), mtp_loss(output.mtp_logits, tokens_BS)]

    def _count(
        self, losses: Sequence[tf.Tensor], places: Sequence[int], routings: Sequence[Routing]
    ) -> None:
        self.parts += tf.stack([tf.stop_gradient(loss) for loss in losses])
        if routings:
            at = tf.constant([[place] for place in places])
            loads = tf.stack([routing.load for routing in routings])
            self.loads = tf.tensor_scatter_nd_add(self.loads, at, loads)

    def _leave(self, work: Work, tensor: tf.Tensor) -> None:
        """Put a result where the next stage finds it: here, or at a neighbour."""
        schedule = self._layout.schedule
        stage = schedule.goes_to(work)
        if stage is None:
            return
        here = schedule.rank_of(stage, work.direction) == self._world.place.pp
        (self._arrived if here else self._leaving)[work] = tensor

    def _backward(self, work: Work) -> list[tf.Tensor]:
        """Do a B, or an I: what waits in `later` is computed now, or in the W."""
        found = self._forwards[work._replace(kind="F")]
        returned = [tf.ones_like(found.results[-1])]
        if len(found.results) > 1:
            returned.insert(0, self._gradient_for(work))
        returned = [self._wait(tensor) for tensor in returned]
        sources = [*([] if found.source is None else [found.source]), *self._weights]
        gradients = found.tape.gradient(found.results, sources, output_gradients=returned)
        ends = []
        if found.source is not None:
            dx, gradients = gradients[0], gradients[1:]
            self._leave(work, dx)
            ends.append(dx)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                self._add(i, tf.convert_to_tensor(gradient), ends)
        if work.kind == "B" and found.later is not None:
            ends += self._add_later(found.later)
        if work.kind == "B":
            del self._forwards[work._replace(kind="F")]
        return ends

    def _gradient_for(self, work: Work) -> tf.Tensor:
        after = work.stage + 1
        for kind in ("B", "I"):
            if (key := work._replace(kind=kind, stage=after)) in self._arrived:
                return self._arrived.pop(key)
        raise AssertionError(f"no gradient has come for {work}")

    def _later(self, work: Work) -> list[tf.Tensor]:
        found = self._forwards.pop(work._replace(kind="F"))
        if found.later is None:
            return self._after
        with tf.control_dependencies(self._after):
            return self._add_later(found.later) or self._after

    def _add_later(self, later: WeightGradients) -> list[tf.Tensor]:
        ends: list[tf.Tensor] = []
        for weight, gradient in later.compute():
            self._add(self._at[id(weight)], gradient, ends)
        return ends

    def _add(self, at: int, gradient: tf.Tensor, ends: list[tf.Tensor]) -> None:
        total = self._sums[at]
        self._sums[at] = gradient if total is None else total + gradient
        ends.append(self._sums[at])


def _deferring(later: WeightGradients | None) -> AbstractContextManager[None]:
    return nullcontext() if later is None else defer_weight_gradients(later)
