"""One training loop for all recipes: seeded, resumable, with progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import written_aside

CHECKPOINT = 100  # steps


def train(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    out: Path,
    *,
    steps: int,
    rate: Callable[[int], float],
    seed: int = 0,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    clip: float = 1.0,
    average: float = 0.0,
    times: Callable[[str], float] = lambda name: 1.0,
    name: str = "checkpoint",
) -> None:
    """Minimise `loss(step)` by AdamW, and leave `model` trained.

    loss draws its own batch, from (seed, step), so that a run that was stopped and goes on from `<name>.safetensors`
    sees what an unbroken one would have. rate: the learning rate of a step. times: by what it is multiplied for the
    parameter of a name. average: decay of the running average of the weights that the model ends with; 0 for the last
    weights themselves.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.safetensors"
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, p in parameters.items():
        alike.setdefault((times(key), weight_decay if p.ndim > 1 else 0.0), []).append(p)
    groups = [{"params": some, "times": factor, "weight_decay": decay} for (factor, decay), some in alike.items()]
    optimizer = torch.optim.AdamW(groups, lr=rate(0), betas=betas, fused=True)
    mean = {key: p.detach().clone() for key, p in parameters.items()} if average else {}
    first = 0
    if path.exists():
        state = load_file(path)
        first = int(state["step"])
        for key, p in parameters.items():
            p.data.copy_(state[key])
            moments = {part: state[f"{part}/{key}"] for part in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": torch.tensor(float(first)), **moments}
            if average:
                mean[key] = state[f"mean/{key}"]
        print(f"{name}: going on from step {first}", flush=True)

    began, running = time.monotonic(), math.nan
    model.train()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["times"]
        torch.manual_seed(hash((seed, step)) % 2**63)  # dropout and noise, too, are those of this step
        found = loss(step)
        found.backward()
        nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimizer.step()
        optimizer.zero_grad()
        for key, kept in mean.items():
            kept.lerp_(parameters[key].data, 1 - min(average, (step + 1) / (step + 10)))
        running = found.item() if math.isnan(running) else 0.95 * running + 0.05 * found.item()
        if not math.isfinite(running):
            raise FloatingPointError(f"{name}: the loss is not finite at step {step}")
        if (step + 1) % 20 == 0:
            pace = (step + 1 - first) / (time.monotonic() - began)
            left = (steps - step - 1) / pace / 60
            print(f"{name} {step + 1}/{steps}  loss {running:.4f}  {pace:.2f} steps/s  {left:.0f} min left", flush=True)
        if (step + 1) % CHECKPOINT == 0 or step + 1 == steps:
            state = {key: p.data for key, p in parameters.items()} | {f"mean/{key}": p for key, p in mean.items()}
            for key, p in parameters.items():
                state |= {f"{part}/{key}": optimizer.state[p][part] for part in ("exp_avg", "exp_avg_sq")}
            with written_aside(path) as draft:
                save_file(state | {"step": torch.tensor(step + 1)}, draft)
    for key, kept in mean.items():
        parameters[key].data.copy_(kept)
    model.eval()


def warm_then_cosine(peak: float, steps: int, warmup: int = 100) -> Callable[[int], float]:
    """A learning rate that rises linearly to `peak`, and falls to zero along half a cosine."""

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return rate


def save_model(model: nn.Module, out: Path) -> None:
    """Save a transformers model in half precision, which halves the file; its config says float32 and is loaded so."""
    import json

    kept = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    half = {}
    for key, value in kept.items():
        if id(value) not in seen:  # tied weights are stored once
            seen.add(id(value))
            half[key] = value.detach().half().contiguous() if value.is_floating_point() else value.detach()
    with written_aside(out / "model.safetensors") as draft:
        save_file(half, draft, metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
