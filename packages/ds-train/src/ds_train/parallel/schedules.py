"""Pipeline schedules as data: what each rank does, in which order, and what it exchanges when.

Four schedules: 1F1B (arXiv 2104.04473), ZB1P (the ZB-H1 of arXiv 2401.10241), DualPipe (arXiv
2412.19437, section 3.2.1) and its V form. A schedule can be printed, drawn, timed and checked
without running anything; `ds_train.parallel` runs it as it stands.

What a rank does with one micro-batch of one stage is a `Work`, of a kind:

- F: forward.
- B: the whole backward pass.
- I, W: its two halves, the gradient of the input and that of the weights. W may come later: nobody
  waits for it. B = I + W.

A slot holds one work, or a forward and a backward one that run at the same time, F&B: the paper's
overlapped pair, where one computes while the other's tokens travel.

Letters: P ranks, M micro-batches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from ds_train.pipeline_part import Half, Holding

Kind = Literal["F", "B", "I", "W"]
Name = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
NAMES: tuple[str, ...] = get_args(Name)


class Work(NamedTuple):
    """One micro-batch in one stage.

    Attributes:
        kind: F, B, I or W.
        stage: from 0, where tokens enter.
        direction: 0 from the first rank to the last; 1 the other way, in DualPipe alone.
        micro_batch: from 0, over both directions.
    """

    kind: Kind
    stage: int
    direction: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


Slot = tuple[Work, ...]


class Exchange(NamedTuple):
    """What a rank and a neighbour give each other at one moment; one operation for both ways.

    Attributes:
        peer: the other rank.
        send: whose results leave: an F's output, or the gradient of an I's or B's input.
        receive: whose results arrive.
    """

    peer: int
    send: Slot
    receive: Slot


@dataclass(frozen=True)
class Costs:
    """Durations, in any unit.

    Attributes:
        forward: F.
        backward: B, both halves.
        weights: W; I is B - W.
        overlapped: F&B; F + B where nothing overlaps.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    overlapped: float = 3.0

    def of(self, slot: Slot) -> float:
        """Return how long a slot takes."""
        if len(slot) > 1:
            return self.overlapped
        halves = {"I": self.backward - self.weights, "W": self.weights}
        return {"F": self.forward, "B": self.backward, **halves}[slot[0].kind]


UNIT = Costs()


@dataclass(frozen=True)
class Schedule:
    """Who does what, in order.

    Attributes:
        name: of the method.
        stages: parts that the model is cut into.
        micro_batches: M.
        ranks: for each of the P ranks its slots in order.
    """

    name: str
    stages: int
    micro_batches: int
    ranks: tuple[tuple[Slot, ...], ...]

    @property
    def splits(self) -> bool:
        """Whether any backward pass comes in two halves."""
        return any(work.kind == "I" for slots in self.ranks for slot in slots for work in slot)

    def rank_of(self, stage: int, direction: int) -> int:
        """Return who holds a stage."""
        ranks = len(self.ranks)
        if direction == 1:
            return ranks - 1 - stage
        return stage if stage < ranks else 2 * ranks - 1 - stage

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a rank holds, in the order of the model."""
        return tuple(sorted({work.stage for slot in self.ranks[rank] for work in slot}))

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """The sets of stages that ranks hold, each once: in DualPipe two ranks hold the same."""
        return tuple(dict.fromkeys(self.held_by(rank) for rank in range(len(self.ranks))))

    def needs(self, work: Work) -> Iterator[Work]:
        """Say what must be done before; of a B or an I the caller finds whichever was done."""
        kind, stage, direction, micro_batch = work
        if kind == "F":
            if stage:
                yield Work("F", stage - 1, direction, micro_batch)
        elif kind == "W":
            yield Work("I", stage, direction, micro_batch)
        else:
            yield Work("F", stage, direction, micro_batch)
            if stage < self.stages - 1:
                yield Work("B", stage + 1, direction, micro_batch)

    def goes_to(self, work: Work) -> int | None:
        """Return which stage takes a work's result, or None."""
        if work.kind == "W":
            return None
        stage = work.stage + (1 if work.kind == "F" else -1)
        return stage if 0 <= stage < self.stages else None

    def peak_activations(self, rank: int) -> int:
        """Return how many micro-batches a rank holds activations of, one stage each, at most."""
        return max(sum(now.kept) + sum(now.waiting) for now in self.holdings(rank))

    def holdings(self, rank: int) -> Iterator[Holding]:
        """Say what a rank holds in each backward work, and after each slot, in order."""
        stages = self.held_by(rank)
        kept, waiting = Counter[int](), Counter[int]()

        def now(doing: Half | None = None, at: int = 0) -> Holding:
            counts = (tuple(count[stage] for stage in stages) for count in (kept, waiting))
            return Holding(doing, at, *counts)

        for slot in self.ranks[rank]:
            kept.update(work.stage for work in slot if work.kind == "F")
            for work in slot:
                if work.kind != "F":
                    yield now(work.kind, stages.index(work.stage))
            kept.subtract(work.stage for work in slot if work.kind in "BI")
            waiting.update(work.stage for work in slot if work.kind == "I")
            waiting.subtract(work.stage for work in slot if work.kind == "W")
            yield now()

    def exchange_rows(self, rank: int) -> int:
        """Return how many micro-batches' states a rank gives or takes in one exchange, at most."""
        exchanges = (item for item in self.programs()[rank] if isinstance(item, Exchange))
        return max((max(len(item.send), len(item.receive)) for item in exchanges), default=0)

    def programs(self) -> tuple[tuple[Slot | Exchange, ...], ...]:
        """Put the exchanges between the slots: for each rank all it does, in order.

        All exchanges have one order, that of the time when what they carry is there, and each rank
        has its own of them in this order. So no rank waits for another that waits for it, even if
        each does one thing after the other, as NCCL asks for.
        """
        timetable = Timetable.of(self, UNIT)
        moments: dict[tuple[float, int, int], list[Work]] = {}
        for rank, slots in enumerate(self.ranks):
            for slot, end in zip(slots, timetable.ends[rank], strict=True):
                for work in slot:
                    stage = self.goes_to(work)
                    peer = rank if stage is None else self.rank_of(stage, work.direction)
                    if peer != rank:
                        key = (end, min(rank, peer), max(rank, peer))
                        moments.setdefault(key, []).append(work)
        programs = []
        for rank, slots in enumerate(self.ranks):
            steps: list[tuple[float, int, Slot | Exchange]] = [
                (start, 1, slot) for slot, start in zip(slots, timetable.starts[rank], strict=True)
            ]
            for (time, low, high), works in sorted(moments.items()):
                if rank in (low, high):
                    mine = [self.rank_of(work.stage, work.direction) == rank for work in works]
                    send = tuple(w for w, own in zip(works, mine, strict=True) if own)
                    receive = tuple(w for w, own in zip(works, mine, strict=True) if not own)
                    steps.append((time, 0, Exchange(low + high - rank, send, receive)))
            steps.sort(key=lambda step: step[:2])  # stable: exchanges of one moment stay in order
            programs.append(tuple(step for _, _, step in steps))
        return tuple(programs)


@dataclass(frozen=True)
class Timetable:
    """When each slot of a schedule runs, if nothing but its inputs and its rank holds it up.

    Attributes:
        starts: for each rank, of each slot.
        ends: the same.
    """

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule, costs: Costs) -> Timetable:
        """Time a schedule; exchanges take no time.

        Raises:
            ValueError: ranks wait for each other; names what the first of them waits for.
        """
        starts: list[list[float]] = [[] for _ in schedule.ranks]
        ends: list[list[float]] = [[] for _ in schedule.ranks]
        done: dict[Work, float] = {}
        moved = True
        while moved:
            moved = False
            for rank, slots in enumerate(schedule.ranks):
                while len(ends[rank]) < len(slots):
                    slot = slots[len(ends[rank])]
                    needed = [done.get(need) for work in slot for need in schedule.needs(work)]
                    known = [time for time in needed if time is not None]
                    if len(known) < len(needed):
                        break
                    start = max([*ends[rank][-1:], *known], default=0.0)
                    end = start + costs.of(slot)
                    starts[rank].append(start)
                    ends[rank].append(end)
                    done |= {_as_done(work): end for work in slot}
                    # Whoever waits for a gradient asks for a B; W asks for its own I.
                    done |= dict.fromkeys(slot, end)
                    moved = True
        for rank, slots in enumerate(schedule.ranks):
            if len(ends[rank]) < len(slots):
                stuck = " & ".join(map(str, slots[len(ends[rank])]))
                raise ValueError(f"rank {rank} waits for ever before {stuck}")
        return cls(tuple(map(tuple, starts)), tuple(map(tuple, ends)))

    @property
    def length(self) -> float:
        """From the first start to the last end."""
        return max(end for ends in self.ends for end in ends)

    def idle(self, rank: int) -> float:
        """Return how long a rank does nothing."""
        pairs = zip(self.starts[rank], self.ends[rank], strict=True)
        return self.length - sum(end - start for start, end in pairs)

    @property
    def bubble(self) -> float:
        """How long the rank that is idle most does nothing."""
        return max(self.idle(rank) for rank in range(len(self.ends)))


def _as_done(work: Work) -> Work:
    return work._replace(kind="B") if work.kind == "I" else work


def published_bubble(name: str, ranks: int, costs: Costs) -> float:
    """Return the idle time that table 2 of arXiv 2412.19437 states for a schedule.

    The formulas hold where W is no longer than F and than I. DualPipe's counts stages, of which its
    V form (README of DualPipe) has two a rank.

    Args:
        name: of the schedule.
        ranks: P.
        costs: F, B, W and F&B.
    """
    f, b, w = costs.forward, costs.backward, costs.weights
    if name == "1f1b":
        return (ranks - 1) * (f + b)
    if name == "zb1p":
        return (ranks - 1) * (f + b - 2 * w)
    half = ranks if name == "dualpipev" else ranks // 2
    return (half - 1) * (costs.overlapped + b - 3 * w)


def make_schedule(name: str, ranks: int, micro_batches: int) -> Schedule:
    """Return the schedule of a method.

    Args:
        name: "1f1b", "zb1p", "dualpipe" or "dualpipev".
        ranks: P; even in DualPipe.
        micro_batches: M; in DualPipe even and at least 2P, in its V form at least 2P.

    Raises:
        ValueError: no such schedule, or numbers that it can't have; says what would be right.
    """
    if name not in NAMES:
        raise ValueError(f"schedule is {name!r}; it must be one of {', '.join(NAMES)}")
    if ranks < 1 or micro_batches < 1:
        raise ValueError(f"{ranks} ranks and {micro_batches} micro-batches; both must be 1 or more")
    two_ways = name.startswith("dualpipe")
    if name == "dualpipe" and (ranks % 2 or micro_batches % 2):
        raise ValueError(
            f"dualpipe with {ranks} ranks and {micro_batches} micro-batches; it feeds both ends, "
            "so both must be even"
        )
    if two_ways and micro_batches < 2 * ranks:
        raise ValueError(
            f"{name} with {micro_batches} micro-batches; {ranks} ranks need {2 * ranks} or more"
        )
    orders: dict[str, Callable[[int, int, int], list[Slot]]] = {
        "1f1b": _one_f_one_b,
        "zb1p": _zb1p,
        "dualpipe": _dualpipe,
        "dualpipev": _dualpipev,
    }
    slots = tuple(tuple(orders[name](ranks, micro_batches, rank)) for rank in range(ranks))
    stages = 2 * ranks if name == "dualpipev" else ranks
    return Schedule(name, stages, micro_batches, slots)


def _one_f_one_b(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """As many forwards as ranks follow, then a forward and a backward in turn."""
    first = min(ranks - 1 - rank, micro_batches)
    slots = [Work("F", rank, 0, m) for m in range(first)]
    for m in range(micro_batches):
        if first + m < micro_batches:
            slots.append(Work("F", rank, 0, first + m))
        slots.append(Work("B", rank, 0, m))
    return [(work,) for work in slots]


def _zb1p(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """As 1F1B with a forward more at first, and W behind I by as many micro-batches as the rank.

    So each rank holds P micro-batches, and the last ones, which start late, put off their W to the
    end, where they would be idle.
    """
    first = min(ranks - rank, micro_batches)
    slots = [Work("F", rank, 0, m) for m in range(first)]
    for m in range(micro_batches):
        slots.append(Work("I", rank, 0, m))
        if m >= rank:
            slots.append(Work("W", rank, 0, m - rank))
        if first + m < micro_batches:
            slots.append(Work("F", rank, 0, first + m))
    slots += [Work("W", rank, 0, m) for m in range(max(micro_batches - rank, 0), micro_batches)]
    return [(work,) for work in slots]


def _dualpipe(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """Both halves of the ranks do the same, each towards the middle: DualPipe's eight phases."""
    half, near = ranks // 2, min(rank, ranks - 1 - rank)
    # Chunk 0 is the one that enters from the rank's own end.
    first = int(rank >= half)
    stages = (near, ranks - 1 - near)
    directions = (first, 1 - first)
    share = micro_batches // 2
    offsets = tuple(direction * share for direction in directions)
    return _both_ways(_TwoChunks(stages, directions, offsets), half, near, share)


def _dualpipev(ranks: int, micro_batches: int, rank: int) -> list[Slot]:
    """DualPipe cut in half: what came from the other end now comes back from the middle."""
    chunks = _TwoChunks((rank, 2 * ranks - 1 - rank), (0, 0), (0, 0))
    return _both_ways(chunks, ranks, rank, micro_batches)


class _TwoChunks:
    """Writes down what a rank does with its two chunks, each in order of micro-batches."""

    def __init__(
        self, stages: Sequence[int], directions: Sequence[int], offsets: Sequence[int]
    ) -> None:
        self.slots: list[Slot] = []
        self._stages, self._directions = stages, directions
        self._next = {"F": list(offsets), "B": list(offsets)}
        self._put_off: deque[Work] = deque()

    def forward(self, chunk: int) -> None:
        self.slots.append((self._take("F", chunk),))

    def backward(self, chunk: int, put_off: bool = False) -> None:
        work = self._take("B", chunk)
        if put_off:
            work = work._replace(kind="I")
            self._put_off.append(work._replace(kind="W"))
        self.slots.append((work,))

    def weights(self) -> None:
        self.slots.append((self._put_off.popleft(),))

    def pair(self, forward: int, backward: int) -> None:
        self.slots.append((self._take("F", forward), self._take("B", backward)))

    def _take(self, kind: Literal["F", "B"], chunk: int) -> Work:
        micro_batch = self._next[kind][chunk]
        self._next[kind][chunk] += 1
        return Work(kind, self._stages[chunk], self._directions[chunk], micro_batch)


def _both_ways(do: _TwoChunks, half: int, near: int, share: int) -> list[Slot]:
    """Go through the phases, as figure 5 of the paper and the published order have them.

    Args:
        do: the rank's two chunks.
        half: ranks from an end to the middle.
        near: how far this rank is from its end.
        share: micro-batches that enter from this end.
    """
    beyond = half - near - 1  # ranks between this one and the middle
    for _ in range(2 * beyond):
        do.forward(0)
    for _ in range(near + 1):
        do.forward(0)
        do.forward(1)
    for _ in range(beyond):
        do.backward(1, put_off=True)
        do.weights()
        do.forward(1)
    for i in range(share - 2 * half + near + 1):
        if i == 0 and beyond == 0:  # apart: the neighbour gets its input sooner
            do.forward(0)
            do.backward(1)
        else:
            do.pair(0, 1)
        do.pair(1, 0)
    for _ in range(beyond):
        do.backward(1)
        do.pair(1, 0)
    # Of the last 2 (near + 1) backward passes the first half puts off nothing.
    for i in range(2 * (near + 1)):
        do.backward(1 - i % 2, put_off=i > near)
    for _ in range(beyond):
        do.weights()
        do.backward(0, put_off=True)
    for _ in range(near + 1):
        do.weights()
    return do.slots
