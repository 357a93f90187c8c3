"""What each pipeline rank of a run holds in memory, in closed form."""

from __future__ import annotations

from ds_train.config import TrainConfig
from ds_train.memory import TrainingMemory, training_memory
from ds_train.parallel.share import layout_of, micro_batches


def memory_of_ranks(config: TrainConfig) -> tuple[int, list[TrainingMemory]]:
    """Say what a step holds; of a run on one process there is one.

    Returns:
        Sequences of the largest micro-batch, and what each pipeline rank holds with such.

    Raises:
        TrainConfigError: the model or the batch does not fit the mesh.
        ValueError: there is no closed form for this.
    """
    table, model = config.train, config.model.build()
    layout = layout_of(config, model)
    sizes = micro_batches(table.batch_size, layout.mesh.data_ranks, table.accumulation)
    batch = max(max(of_rank) for of_rank in sizes)
    given = model, batch, config.data.sequence_length, table.dtype_policy, table.recompute
    if layout.mesh.size == 1:
        return batch, [training_memory(*given)]
    parts = [layout.memory_part(rank, bool(config.parallel.zero)) for rank in range(layout.mesh.pp)]
    return batch, [training_memory(*given, part) for part in parts]
