"""Sessions that open, run, fail, copy and close in any order: each sees what it should, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import torch
from families import build
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.utils import checkpoint
from transformers import AttentionInterface, DynamicCache, GenerationMixin
from ways import is_clean

import regard
from regard import seam

IDS = (torch.arange(16).reshape(2, 8) * 11) % 80 + 3
MODELS = {implementation: build("llama", implementation)[0] for implementation in ("sdpa", "eager")}
TWINS = copy.deepcopy(MODELS)  # of which nothing is asked while sessions are open on the others
SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
FACTORS = (0.5, 2.0, 4.0)  # whose products are exact


class Times:
    """Multiply what heads give."""

    def __init__(self, by: float) -> None:
        self.by = by

    def output(self, call: regard.Call, output: torch.Tensor) -> torch.Tensor:
        return output * self.by


class Mine(Exception):
    """What a pass is broken with."""


class Open:
    """One open session, and what it should have seen."""

    def __init__(self, block: Any, factor: float = 1.0, exact: bool = True) -> None:
        self.block, self.factor, self.exact = block, factor, exact
        self.made, self.runs = block.__enter__(), 0


def world(model: nn.Module) -> list[Any]:
    """All that a session may change, on the model and outside."""
    tables = [getattr(m, name) for m in model.modules() for name in vars(m) if name.endswith("_hooks")]
    known = [vars(kind) for kind in (GenerationMixin, DynamicCache, nn.Module)]
    return [
        [list(table) for table in tables],
        ["forward" in vars(module) for module in model.modules()],
        dict(AttentionInterface._global_mapping),
        AttentionInterface.get_interface,
        [(name, value) for held in known for name, value in held.items() if callable(value)],
        (checkpoint.CheckpointFunction, checkpoint._checkpoint_without_reentrant_generator),
        (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(), torch.is_autocast_enabled("cpu")),
        (torch.backends.mha.get_fastpath_enabled(), torch.compiler.is_compiling(), model.config._attn_implementation),
        torch._dynamo.eval_frame._stance.stance,
        torch.overrides._get_current_function_mode_stack(),
        model.training,
    ]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


TRUTH: dict[tuple[str, float], torch.Tensor] = {}


@torch.no_grad()
def truth(implementation: str, factor: float) -> torch.Tensor:
    """What the twin gives under one intervention."""
    if (implementation, factor) not in TRUTH:
        with regard.intervene(TWINS[implementation], Times(factor)):
            TRUTH[implementation, factor] = TWINS[implementation](IDS).logits
    return TRUTH[implementation, factor]


with torch.no_grad():
    PLAIN = {name: model(IDS).logits for name, model in MODELS.items()}
    MADE = {name: model.generate(IDS, **SETTINGS) for name, model in MODELS.items()}
    with regard.record(TWINS["sdpa"], "entropy") as _recording:
        TWINS["sdpa"](IDS)
FIRST = _recording.tree["language_model"]["entropy"].sel(layer=0).values  # which no output of attention changes


class Sessions(RuleBasedStateMachine):
    @initialize(implementation=st.sampled_from(sorted(MODELS)))
    def begin(self, implementation: str) -> None:
        self.implementation, self.model = implementation, MODELS[implementation]
        self.open: list[Open] = []
        self.before = world(self.model), state(self.model)

    @property
    def factor(self) -> float:
        return float(torch.tensor([one.factor for one in self.open]).prod())

    def recorders(self) -> list[Open]:
        return [one for one in self.open if one.made is not None]

    def ran(self) -> None:
        for one in self.recorders():
            one.runs += 1

    # Sessions

    @precondition(lambda self: len(self.open) < 4)
    @rule(own=st.booleans(), names=st.sampled_from([("entropy",), ("received", "entropy"), ("rows", "entropy")]))
    def record(self, own: bool, names: tuple[str, ...]) -> None:
        self.open.append(Open(regard.record(self.model, *names, own_output=own), exact=own))

    @precondition(lambda self: len(self.open) < 4)
    @rule(by=st.sampled_from(FACTORS))
    def intervene(self, by: float) -> None:
        self.open.append(Open(regard.intervene(self.model, Times(by)), by))

    @rule(which=st.sampled_from(["name", "thing", "roles"]))
    def refuse(self, which: str) -> None:
        """A session that does not open, or fails in its first pass."""
        made = {
            "name": lambda: regard.record(self.model, "no such statistic"),
            "thing": lambda: regard.intervene(self.model, object()),
            "roles": lambda: regard.record(self.model, "entropy", roles=["user"]),
        }
        try:
            with torch.no_grad(), made[which]():
                self.model(IDS)
        except (KeyError, ValueError, TypeError):
            pass
        else:
            raise AssertionError(f"{which} was let through")

    @precondition(lambda self: self.open)
    @rule(data=st.data(), error=st.sampled_from([None, None, Mine, KeyboardInterrupt]))
    def close(self, data: st.DataObject, error: type[BaseException] | None) -> None:
        """Any of them, also by an error."""
        one = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.end(one, error)

    def end(self, one: Open, error: type[BaseException] | None) -> None:
        told = (None, None, None) if error is None else (error, error(), None)
        assert not one.block.__exit__(*told)
        if one.made is not None:
            self.judge(one, interrupted=error is not None)

    # Passes

    @torch.no_grad()
    @rule()
    def run(self) -> None:
        logits = self.model(IDS).logits
        self.ran()
        if self.factor == 1.0 and all(one.factor == 1.0 for one in self.open):
            if all(one.exact for one in self.recorders()):
                assert torch.equal(logits, PLAIN[self.implementation])
            torch.testing.assert_close(logits, PLAIN[self.implementation], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, truth(self.implementation, self.factor), atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    @rule()
    def generate(self) -> None:
        made = self.model.generate(IDS, **SETTINGS)
        self.ran()
        if all(one.factor == 1.0 for one in self.open):
            assert torch.equal(made, MADE[self.implementation])

    @torch.no_grad()
    @rule(layer=st.integers(0, 1), error=st.sampled_from([Mine, KeyboardInterrupt, GeneratorExit]))
    def fail(self, layer: int, error: type[BaseException]) -> None:
        def broken(*_: Any) -> None:
            raise error

        handle = self.model.model.layers[layer].mlp.register_forward_pre_hook(broken)
        try:
            self.model(IDS)
        except error:
            pass
        else:
            raise AssertionError("the pass did not fail")
        finally:
            handle.remove()
        self.ran()

    @rule()
    def train(self) -> None:
        logits = self.model(IDS, use_cache=False).logits
        (slope,) = torch.autograd.grad(logits.square().sum(), self.model.lm_head.weight)
        self.ran()
        assert slope.abs().max() > 0

    # Looks from outside

    @torch.no_grad()
    @rule()
    def copied(self) -> None:
        """A copy is a plain model."""
        twin = copy.deepcopy(self.model)
        assert torch.equal(twin(IDS).logits, PLAIN[self.implementation])
        assert not [h for m in twin.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]

    @precondition(lambda self: self.recorders())
    @rule(data=st.data())
    def peek(self, data: st.DataObject) -> None:
        self.judge(data.draw(st.sampled_from(self.recorders())))

    def judge(self, one: Open, interrupted: bool = False) -> None:
        assert len(one.made) == one.runs
        for tree in list(one.made) if one.runs else []:
            first = tree["language_model"]["entropy"].sel(layer=0).values[:, :, :8]
            torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(FIRST), atol=1e-4, rtol=1e-4)
        if one.runs and interrupted:
            assert one.made.partial

    @invariant()
    def watched_while_open(self) -> None:
        if getattr(self, "open", None) is not None:
            seen = {session for held in seam._sessions.values() for session in held}
            assert len(seen) == len(self.open)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for number, one in enumerate(list(self.open)):
            self.end(one, Mine if number == 1 else None)
        before, held = self.before
        assert is_clean(self.model)
        for now, then in zip(world(self.model), before, strict=True):
            assert now == then
        assert all(torch.equal(tensor, held[name]) for name, tensor in self.model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(self.model(IDS).logits, PLAIN[self.implementation])


Sessions.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestSessions = Sessions.TestCase
