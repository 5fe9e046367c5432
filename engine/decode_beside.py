"""How does decoding go on while prompts are computed? One decoding step at a time, looked after between their layers.

    engine thread   [layer][layer] look [layer] look [layer] look ...        launches the prompts' layers, and
    one stream      | layers of a group | decoding | layers of a group |     (layered) decoding behind some of them, or
    two streams     | layers, on their partition of the device ......  |     (partitioned) decoding beside them
                    | decoding | decoding | decoding | decoding |

There is one thread, so one owner of pages, books and sampler, and no lock is held or waited for: two threads would take
turns at Python's lock anyway, in slices of milliseconds. A *look* is quick while nothing is ready. When the decoding
step's tokens are there, they are booked, and the next step is planned and launched, whatever the prompts' layers do.

On a CPU a decoding step is done when it is launched. A partition needs a GPU: elsewhere ``partitioned`` decodes after
every layer, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

from engine.colocated_mode import Choice, Slowdowns, StepShape, layer_group
from engine.launched_step import LaunchedStep, StepOutput
from engine.phase_streams import PhaseStreams
from engine.step_budget import Costs
from engine.step_plan import StepPlan

_LOOK_EVERY_S = 50e-6  # while the host is ahead of the device


@dataclass(frozen=True, slots=True)
class EngineCalls:
    """What an engine does with a decoding step."""

    plan: Callable[[StepPlan], StepPlan | None]  # beside these prompts
    launch: Callable[[StepPlan], LaunchedStep | StepOutput]  # an output is of a step that failed
    finish: Callable[[LaunchedStep], StepOutput]


class DecodeBeside:
    """Decoding beside prompts. For the engine's thread."""

    def __init__(
        self,
        mode: str,
        streams: PhaseStreams,
        slo_s: float | None,
        costs: Costs,
        num_layers: int,
        calls: EngineCalls,
    ) -> None:
        """``mode``: layered or partitioned."""
        self.streams = streams
        self.slowdowns = Slowdowns([partition.share for partition in streams.partitions])
        self.num_steps = 0  # of decoding, that were launched beside prompts
        self.is_crowded = False  # whether anything was, beside the latest prompts
        self._mode = mode
        self._slo_s = slo_s
        self._costs = costs
        self._num_layers = num_layers
        self._calls = calls
        self._launched: LaunchedStep | None = None
        self._prompts: StepPlan | None = None  # being computed
        self._partition = 0
        self._group = 1  # layers between two decoding steps
        self._at_layer = 0  # so many had been launched when decoding was last launched
        self._choice = Choice(0, "no prompt was computed yet")
        self._pause = Event()

    @property
    def is_under_way(self) -> bool:
        """Whether a decoding step was launched and not booked."""
        return self._launched is not None

    @property
    def reason(self) -> str:
        """How the latest group or partition was chosen, and why there are no other partitions."""
        return "; ".join(part for part in (self._choice.reason, self.streams.reason) if part)

    def begin(self, prompts: StepPlan) -> tuple[int, list[StepOutput]]:
        """``prompts`` is computed from now on: the partition to compute it on, and what decoding brought meanwhile."""
        self._prompts, self._at_layer = prompts, 0
        outputs = [self.finish()] if self._launched is not None and self._launched.is_done else []
        if self._launched is None:
            outputs += self._launch(0)
        decoding = StepShape() if self._launched is None else shape_of(self._launched.plan)
        self.is_crowded = decoding.batch > 0
        costs = self._costs()
        if self.streams.overlaps:
            self._choice = self.slowdowns.choose(costs, self._slo_s, decoding)
            self._partition = self._choice.number
        elif self._mode == "layered":
            self._choice = layer_group(costs, self._slo_s, self._num_layers, shape_of(prompts), decoding)
            self._group = self._choice.number
        return self._partition, outputs

    def end(self) -> None:
        """The prompts' step is computed, or has failed."""
        self._prompts = None

    def look(self, num_layers: int) -> list[StepOutput]:
        """Book what is ready and launch what is due, when ``num_layers`` of the prompts' layers have been launched."""
        outputs: list[StepOutput] = []
        if self._launched is not None:
            if not self._launched.is_done:
                return outputs
            outputs.append(self.finish())
        if self.streams.overlaps or num_layers >= self._at_layer + (self._group if self._mode == "layered" else 1):
            outputs += self._launch(num_layers)
            if self._launched is not None and self._launched.is_done:  # on a CPU
                outputs.append(self.finish())
        return outputs

    def _launch(self, num_layers: int) -> list[StepOutput]:
        """Launch a decoding step, if anybody decodes; what failed of it."""
        plan = None if self._prompts is None else self._calls.plan(self._prompts)
        if plan is None:
            return []
        self._at_layer = num_layers
        with self.streams.decoding():
            launched = self._calls.launch(plan)
        if isinstance(launched, StepOutput):
            return [launched]
        self._launched = launched
        self.num_steps += 1
        self.is_crowded = True
        return []

    def finish(self) -> StepOutput:
        """Wait for the decoding step that is under way, and book it."""
        launched, self._launched = self._launched, None
        assert launched is not None, "asked by the caller"
        return self._calls.finish(launched)

    def pause(self) -> None:
        """Let other threads run for a moment, while there is nothing to do but wait for the device."""
        self._pause.wait(_LOOK_EVERY_S)

    def took(self, decoding: StepShape, seconds: float) -> None:
        """A decoding step took so long beside prompts on another stream."""
        costs = self._costs()
        if costs is not None:
            alone_s = costs.decode(decoding.batch, decoding.context_tokens)
            self.slowdowns.learn(self._partition, alone_s, seconds)


def shape_of(plan: StepPlan) -> StepShape:
    """What a step holds."""
    tokens, pairs, batch, context = 0, 0.0, 0, 0
    for item in plan.items:
        num_tokens = len(item.token_ids)
        if num_tokens == 1:
            batch += 1
            context += item.start + 1
        else:
            tokens += num_tokens
            pairs += num_tokens * (item.start + num_tokens / 2)
    return StepShape(tokens, pairs, batch, context)
