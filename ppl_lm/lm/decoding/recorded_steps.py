"""Steps in memory that stays where it is, recorded once and run again: CUDA graphs.

On a GPU the launch of a small network's kernels, one by one, takes longer than they do; a graph launches all of them at once.
No GPU has run this yet: nothing is recorded unless `ENABLED` is set."""

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from ppl_lm.lm import meter
from ppl_lm.lm.checking.tolerances import tolerance_of
from ppl_lm.lm.decoding.cache import Cache
from ppl_lm.lm.network import Network
from ppl_lm.lm.scoring.teacher_forcing import normalise, positions

ENABLED = False  # set it to True where the tests of `test_recorded_steps.py` were run on a GPU
WORTH = 16  # tokens a text: a recording takes as long as two or three steps
_ONE_AT_A_TIME = Lock()
KNOWN = ("torch", "transformers", "peft")  # whose modules do the same at every step


class FixedLayer(DynamicLayer):
    """Keys and values of N rows with room for so many tokens, of which the next ones are written at `place`, (1,)."""

    def __init__(self, layer: Any, room: int, place: Int[Tensor, "one"]):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.place, free = place, room - layer.keys.shape[-2]
        self.keys, self.values = (nn.functional.pad(v, (0, 0, 0, free)) for v in (layer.keys, layer.values))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        kept: Any = self.keys, self.values
        for memory, new in zip(kept, (key_states, value_states), strict=True):
            memory.index_copy_(2, self.place, new.to(memory.dtype))
        return kept

    def get_seq_length(self, *_: Any) -> int:
        return 0  # what is hidden is said by the mask, and where a token stands by its position


class RecordedSteps:
    """A decoder's cache, and the network's step with it, for up to N rows. Recorded anew for more rows than that, for half as
    many, and where the room is full."""

    def __init__(self, lm: Network, cache: Cache, room: int):
        """:param cache: after the prompts; `room`: for how many tokens, prompt and text."""
        self.lm, self.room, device = lm, -(-room // 8) * 8, lm.device  # attention kernels want multiples of 8
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers: list[Any] = [FixedLayer(layer, self.room, self.place) for layer in cache.layers]
        self.replay: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def step(
        self, ids: Int[Tensor, "M 1"], mask: Bool[Tensor, "M L"], positions: Int[Tensor, "M 1"]
    ) -> Float[Tensor, "M V"]:
        """What the network answers after one more token of each row, float32 or wider.

        :param mask: as `Network.logits` takes it, the new token among its columns."""
        count, length = mask.shape
        if length > self.room:
            self.room *= 2
            self.layers = [FixedLayer(layer, self.room, self.place) for layer in self.layers]
            self.replay = None
        if self.replay is None:
            self._make_inputs()
        self.ids[:count], self.positions[:count] = ids, positions
        self.mask[:count, 0, 0, :length] = self.mask.new_zeros(mask.shape).masked_fill(~mask, self.hidden)
        self.place.fill_(length - 1)
        if self.replay is None:
            with meter.unmeasured(), _without_kept_weights(self.lm.device.type):
                self.replay = record(self._step)
        meter.add(lm_tokens=count * self.lm.networks)
        return self.replay()[:count]

    def batch_select_indices(self, indices: Int[Tensor, "M"]) -> None:
        """Row i becomes a copy of what was row `indices[i]`."""
        rows, count = len(self.layers[0].keys), len(indices)
        if rows // 2 < count <= rows:
            changed = (indices != torch.arange(count, device=indices.device)).nonzero()[:, 0]
            for layer in self.layers:
                for kept in (layer.keys, layer.values):
                    kept.index_copy_(0, changed, kept.index_select(0, indices[changed]))
        else:
            self.replay = None
            for layer in self.layers:
                layer.keys, layer.values = layer.keys[indices], layer.values[indices]

    def _make_inputs(self) -> None:
        rows, dtype = len(self.layers[0].keys), self.layers[0].keys.dtype
        self.hidden = torch.finfo(dtype).min
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.lm.device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.full((rows, 1, 1, self.room), self.hidden, dtype=dtype, device=self.lm.device)
        self.cache: Any = Cache()
        self.cache.layers = self.layers

    def _step(self) -> Float[Tensor, "N V"]:
        given: Any = {"ids": self.ids, "mask": self.mask, "positions": self.positions}
        return self.lm.logits(**given, cache=self.cache, use_cache=True)[0][:, -1]


def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """What runs a step's kernels again, on what then lies in the memory that they read, and gives the same tensor each time.
    The step is run once before, as its libraries need. One is recorded at a time, as CUDA asks for."""
    with _ONE_AT_A_TIME:
        before = torch.cuda.current_stream()
        aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(before)
        with torch.cuda.stream(aside):
            step()
        before.wait_stream(aside)
        with torch.cuda.stream(before), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            answer = step()

    def replay() -> Tensor:
        graph.replay()
        return answer

    return replay


def _without_kept_weights(kind: str) -> torch.autocast:
    """Inside the block, autocast converts weights at every use: what is converted outside of a graph is gone when it runs."""
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )


def has_graphs(device: torch.device) -> bool:
    return ENABLED and device.type == "cuda" and device.index in (None, torch.cuda.current_device())


def may_record(lm: Network, cache: Any, width: int) -> bool:
    """Whether a decoder's steps are recorded: where that is `ENABLED`, on a device that has graphs, where texts are long enough
    to be worth it and the room for them reaches beyond no length at which the law may change, of networks whose modules are
    torch's, transformers' or PEFT's without a hook, with a cache of keys and values alone, and of which a few recorded steps
    were found to be those that were not. The last is found out once.

    :param width: tokens of the prompt."""
    if not has_graphs(lm.device) or lm.max_new_tokens < WORTH or not _is_plain(cache) or not _is_known(lm.model):
        return False
    if any(length < width + lm.max_new_tokens + 8 for length in lm.boundaries):
        return False
    if lm.shortcuts.steps is None:
        lm.shortcuts.steps = _same_steps(lm)
    return lm.shortcuts.steps


def _is_plain(cache: Any) -> bool:
    layers = getattr(cache, "layers", [])
    return type(cache) is Cache and bool(layers) and all(type(v) is DynamicLayer and v.keys is not None for v in layers)


def _is_known(model: nn.Module) -> bool:
    """Whether no module has a hook, or a forward that another library wrote or that was put on it: what is recorded is what the
    network does once."""
    return not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or type(module).forward.__module__.split(".")[0] not in KNOWN
        for module in model.modules()
    )


@torch.no_grad()
def _same_steps(lm: Network) -> bool:
    """Whether recorded steps say what the others do: of two prompts of different length, whose rows are moved, dropped and
    copied on the way."""
    if lm.max_positions is not None and lm.max_positions < 12:
        return False
    ids = torch.linspace(0, lm.vocabulary.size - 1, 12, device=lm.device).long()
    mask = torch.ones(2, 3, dtype=torch.bool, device=lm.device)
    mask[0, 0] = False
    start: Any = {"ids": ids[:6].reshape(2, 3), "mask": mask, "positions": positions(mask)}
    try:
        with meter.unmeasured():
            _, cache = lm.logits_next(**start, cache=lm.new_cache())
            _, copied = lm.logits_next(**start, cache=lm.new_cache())
            recorded = RecordedSteps(lm, copied, 5)
            for moved in ([1, 0], [0, 1], [1], [0, 0, 0], [2, 1, 0]):
                rows = torch.tensor(moved, device=lm.device)
                mask = torch.cat([mask[rows], mask.new_ones(len(rows), 1)], 1)
                given: Any = {"ids": ids[-len(rows) :, None], "mask": mask, "positions": mask.sum(-1, keepdim=True) - 1}
                for one in (cache, recorded):
                    one.batch_select_indices(rows)
                plain, cache = lm.logits_next(**given, cache=cache)
                own, theirs = normalise(recorded.step(**given)), normalise(plain)
                apart = torch.where(own == theirs, 0.0, (own - theirs).abs())  # of two -inf there is no difference
                if not float(apart.max()) <= tolerance_of(lm):
                    return False
    except Exception:  # whatever a network or a driver does that cannot be recorded: then it is not
        return False
    return True
