"""A checkpoint in another dtype or form, under its final name only once it is whole."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast, get_args
from zipfile import BadZipFile

import keras
import numpy as np

from ds_model.checkpoint import atomic
from ds_model.checkpoint.checking import check_layout, present_depth
from ds_model.checkpoint.fp8 import SCALES, Fp8Matrix, is_quantized, quantize
from ds_model.checkpoint.fp8 import quantization_config as fp8_config
from ds_model.checkpoint.journal import Journal, Progress
from ds_model.checkpoint.packed import PACKED, PARTS, SCALE, PackedMatrix, pack
from ds_model.checkpoint.packed import quantization_config as packed_config
from ds_model.checkpoint.reader import INDEX, TensorFiles, check_directory, read_json
from ds_model.checkpoint.saving import KEPT_FLOAT32, DTypeName, save, stored_dtype
from ds_model.checkpoint.small import forms_by_name
from ds_model.checkpoint.transforms import Matrix, blocks
from ds_model.checkpoint.writer import MAX_SHARD_BYTES, TensorWriter
from ds_model.config import ModelConfig
from ds_model.errors import CheckpointError

if TYPE_CHECKING:
    from ds_model.causal_lm import CausalLM

SmallName = Literal["fp8", "int8", "int8_channel", "int4"]
Heard = Callable[[str, float], None]
"""Told the name of a matrix, and the error of its small form as a share of it."""

_SMALL = get_args(SmallName)
_HEAD_COPY = ".shared_head.head.weight"
_COMPANIONS = ("*.json", "*.jinja", "*.model", "LICENSE*")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


class ExpertSlice(NamedTuple):
    """One rank's share of the routed experts: as many neighbours as every other rank's.

    Attributes:
        rank: from 0.
        of: ranks that share the experts.
    """

    rank: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `RANK/OF`, such as `0/8`.

        Raises:
            CheckpointError: it is not that; the rank is out of range.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        found = cls(*map(int, match.groups())) if match else cls(0, 0)
        if not found.rank < found.of:
            raise CheckpointError(f"experts is {text!r}; it must be RANK/OF, such as 0/8 to 7/8")
        return found

    def has(self, name: str, config: ModelConfig) -> bool:
        """Say whether a tensor belongs to this rank.

        Raises:
            CheckpointError: the experts can't be shared out evenly.
        """
        experts = config.n_routed_experts or 0
        if not experts or experts % self.of:
            raise CheckpointError(
                f"{experts} experts can't be shared out evenly to {self.of} ranks"
            )
        match = _EXPERT.search(name)
        return match is None or int(match.group(1)) * self.of // experts == self.rank


def to_hf(
    source: Path,
    target: Path,
    dtype: DTypeName | SmallName | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda done, total: None,  # noqa: ARG005 - named for the reader
    experts: ExpertSlice | None = None,
    heard: Heard | None = None,
) -> None:
    """Write a released directory from another one, or from a `.keras` file.

    A directory is read and written tensor by tensor, its tokenizer and other JSON files copied.
    One that is stopped, by a kill or a full disk, goes on with the next shard when it is called
    again. The target gets a list of checksums, SHA256SUMS.

    Args:
        source: the directory or the `.keras` file.
        target: must not exist, or be an empty directory.
        dtype: of the tensors; `None` keeps them. The router's bias is kept in any case. "fp8" is
            the released form: linear maps in E4M3 with a scale a block, all else bfloat16. "int8",
            "int8_channel" and "int4" are those of `quantize_weights`, as `compressed-tensors`
            stores them, all else bfloat16.
        max_shard_bytes: above it, shards with an index.
        progress: told the tensors done and the tensors in all.
        experts: write these routed experts alone, and everything else, for one rank.
        heard: told of each matrix that is made small: the norm of what rounding changes over the
            matrix's own. Those that an earlier, stopped conversion wrote are not told again.

    Raises:
        CheckpointError: the source is not a whole checkpoint; the target exists; no room; a value
            does not fit float16; experts that can't be shared out; a matrix that can't be made
            small, with a width that 32 does not divide or a number that is not finite.
        ConfigError: the source's `config.json` is wrong.
    """
    with _staged(target) as stage:
        if source.is_file():
            if dtype in _SMALL or experts:
                what = f"{dtype} is" if dtype in _SMALL else "slices are"
                raise CheckpointError(f"{source} is a .keras file; {what} made of a directory")
            save(_load_keras(source), stage, cast("DTypeName | None", dtype), max_shard_bytes)
            progress(1, 1)
            return
        config = ModelConfig.from_pretrained(check_directory(source))
        stage.mkdir(exist_ok=True)
        with TensorFiles(source) as files:
            depth = present_depth(files, config)
            config = config.replace(num_nextn_predict_layers=depth)
            check_layout(files, config)
            split = _split(files, config, dtype)
            taken = _taken(files, dtype, split)
            if experts:
                taken = [name for name in taken if experts.has(name, config)]
            origin = {"source": _fingerprint(source), "dtype": dtype, "experts": experts}
            journal = Journal(stage, origin | {"max_shard_bytes": max_shard_bytes})
            done = sum(shard.tensor_bytes for shard in journal.shards)
            _check_room(_bytes_needed(files, taken, dtype) - done, stage)
            total = sum(len(_parts_of(name, split)) for name in taken)
            with TensorWriter(
                stage, max_shard_bytes, lambda done: progress(done, total), journal
            ) as writer:
                _copy_tensors(files, taken, writer, dtype, split, heard)
                writer.finish()
        _copy_companions(source, stage)
        values = _config_of(read_json(source / "config.json"), dtype)
        if experts:
            values["expert_slice"] = experts._asdict()
        atomic.write(stage / "config.json", (json.dumps(values, indent=2) + "\n").encode())


def _split(files: TensorFiles, config: ModelConfig, dtype: str | None) -> dict[str, str]:
    """The tensors that are made small, with the mode of each."""
    if dtype == "fp8":
        return {name: dtype for name in files.names if is_quantized(name)}
    return forms_by_name(config, dtype) if dtype in _SMALL and dtype else {}


def _taken(files: TensorFiles, dtype: str | None, split: dict[str, str]) -> list[str]:
    """The tensors that are gone through; parts go with their whole where that changes."""
    if dtype is None:
        return files.stored_names
    # A copy of the head in bfloat16 would be larger than the head, and unequal to it.
    dropped = _HEAD_COPY if "lm_head.weight" in split else None
    return [name for name in files.names if dropped is None or not name.endswith(dropped)]


def _parts_of(name: str, split: dict[str, str]) -> list[str]:
    """The names that a tensor is written under."""
    mode = split.get(name)
    if mode is None:
        return [name]
    return [name, name + SCALES] if mode == "fp8" else [name + part for part in PARTS]


def _copy_tensors(
    files: TensorFiles,
    taken: list[str],
    writer: TensorWriter,
    dtype: DTypeName | SmallName | None,
    split: dict[str, str],
    heard: Heard | None,
) -> None:
    other = cast("DTypeName", "bfloat16" if dtype in _SMALL else dtype)
    for name in taken:
        if all(writer.has(part) for part in _parts_of(name, split)):
            continue
        if dtype is None:
            writer.add(name, files.stored(name))
        elif name in split:
            for part, array in _made_small(name, files.read(name), split[name], heard).items():
                if not writer.has(part):
                    writer.add(part, array)
        else:
            writer.add(name, files.read(name), stored_dtype(name, other))


def _made_small(name: str, matrix: Matrix, mode: str, heard: Heard | None) -> dict[str, Any]:
    """The tensors that a matrix is stored in, by name."""
    small: Matrix
    if mode == "fp8":
        values, scales = quantize(matrix)
        parts, small = {name: values, name + SCALES: scales}, Fp8Matrix(values, scales)
    else:
        try:
            found = pack(matrix, mode)
        except ValueError as error:
            raise CheckpointError(f"tensor {name}: {error}") from error
        parts = {name + part: array for part, array in found.items()}
        small = PackedMatrix(found[PACKED], found[SCALE], matrix.shape[1])
    if heard:
        heard(name, relative_error(matrix, small))
    return parts


def relative_error(matrix: Matrix, small: Matrix) -> float:
    """The norm of the difference over the matrix's own; 0 for zeros."""
    wrong = size = 0.0
    for rows in blocks(matrix):
        exact = np.asarray(matrix[rows], np.float32)
        apart = np.asarray(small[rows], np.float32) - exact
        wrong += float(np.square(apart).sum(dtype=np.float64))
        size += float(np.square(exact).sum(dtype=np.float64))
    return math.sqrt(wrong / size) if size else 0.0


def _bytes_needed(files: TensorFiles, taken: list[str], dtype: str | None) -> int:
    """At most so many bytes are written."""
    if dtype is None:
        return sum(files.stored(name).nbytes for name in taken)
    wide = dtype == "float32"
    return sum(
        (4 if wide or name.endswith(KEPT_FLOAT32) else 2) * math.prod(files.shape(name))
        for name in taken
    )


def _fingerprint(source: Path) -> list[tuple[str, int, int]]:
    """Tells a source from one that was changed: names, sizes and times of its files."""
    found = [(path.name, path.stat()) for path in sorted(source.iterdir()) if path.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _config_of(values: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """`config.json` of the same model with its tensors in another dtype."""
    if dtype is None:
        return values
    written = [field for field in ("dtype", "torch_dtype") if field in values] or ["torch_dtype"]
    values |= dict.fromkeys(written, "bfloat16" if dtype in _SMALL else dtype)
    values.pop("quantization_config", None)
    if dtype in _SMALL:
        values["quantization_config"] = fp8_config() if dtype == "fp8" else packed_config(dtype)
    return values


def to_keras(source: Path, target: Path, dtype: DTypeName | None = None) -> None:
    """Write a `.keras` file from a released directory; the whole model is in memory meanwhile.

    Args:
        source: the directory.
        target: a path that ends in `.keras` and does not exist.
        dtype: Keras dtype policy of the model; `None` is Keras' default.

    Raises:
        CheckpointError: the source is not a whole checkpoint; the target exists or is not named
            `.keras`.
        ConfigError: the source's `config.json` is wrong.
    """
    from ds_model.causal_lm import CausalLM  # noqa: PLC0415 - the model imports this package

    if target.suffix != ".keras":
        raise CheckpointError(f"{target} must end in .keras")
    if source.is_file():
        raise CheckpointError(f"{source} is a file; a directory with config.json is converted")
    with _staged(target) as stage:
        model = CausalLM.from_pretrained(check_directory(source), dtype=dtype)
        draft = stage.with_name(f"{stage.name}.keras")  # Keras insists on the suffix
        try:
            model.save(draft)
            draft.replace(stage)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A place beside `target` that becomes `target` when the block ends well."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target} exists: name a new directory, nothing is overwritten")
    stage = atomic.partial(target.absolute())
    if not (stage / Journal.NAME).is_file():
        _remove(stage)  # left by a run that was killed before it got anything done
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield stage
        atomic.publish(stage, target)
    except OSError as error:
        raise CheckpointError(f"{target} can't be written: {error}{_goes_on(stage)}") from error
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise CheckpointError(f"{error}{_goes_on(stage)}") from error.__cause__
        _remove(stage)  # what was asked for can't be had
        raise
    finally:
        if not (stage / Journal.NAME).is_file():
            _remove(stage)


def _goes_on(stage: Path) -> str:
    return "; run it again to go on" if (stage / Journal.NAME).is_file() else ""


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _check_room(needed: int, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        message = f"no room beside {place}: {needed:,} bytes needed at most, {free:,} free"
        raise CheckpointError(message)


def _copy_companions(source: Path, stage: Path) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file() and path.name not in (INDEX, Journal.NAME, "config.json"):
                shutil.copyfile(path, stage / path.name)


def _load_keras(source: Path) -> "CausalLM":
    from ds_model.causal_lm import CausalLM  # noqa: PLC0415 - the model imports this package

    try:
        model = keras.saving.load_model(source, compile=False)
    except (ValueError, TypeError, KeyError, OSError, BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{source} is no readable .keras file: {reason}") from error
    if not isinstance(model, CausalLM):
        raise CheckpointError(f"{source} holds a {type(model).__name__}, not a CausalLM")
    return model
