"""Trains a small GPT on the sources of CPython's standard library, and checkpoints while it trains.

    python examples/train_gpt.py --root runs/gpt --steps 200 --save-every 20

Start it again with the same --root and it goes on from the newest good checkpoint, bit for bit where
it would have been: weights, moments, schedule, random numbers (dropout) and place in the shuffle.

With --log every step is a line of JSON, the loss in hexadecimal (`float.hex`): equal text, equal bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# Read by cuBLAS when it starts: without it, matrix products on CUDA are not deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from corpus import WindowLoader, read_stdlib_sources
from gpt import GPT, GPTConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from asyncckpt import AsyncCheckpointer, SaveHandle

WARM_UP_STEPS = 20
PEAK_LEARNING_RATE = 1e-3
GRADIENT_NORM_MAX = 1.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="directory of the checkpoints")
    parser.add_argument("--steps", type=int, default=200, help="train until this step (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows in a batch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=("dcp", "megatron"), default="dcp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads: part of what decides the bits")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON lines: steps and saves")
    parser.add_argument("--final", type=Path, metavar="FILE", help="JSON: SHA-256 of all state at the end")
    parser.add_argument(
        "--time-torch-save",
        type=Path,
        metavar="FILE",
        help="between two saves, write the same state there by torch.save + fsync, and log how long it took",
    )
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.save_every < 1:
        parser.error("--steps and --save-every count from 1")
    if arguments.device == "cuda" and (reason := why_no_cuda()):
        parser.error(f"--device cuda: {reason}")
    return arguments


def why_no_cuda() -> str | None:
    """What keeps torch from using a CUDA device here; None if nothing does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return f"torch {torch.__version__} finds no CUDA device and driver that it can use (does nvidia-smi?)"


def make_deterministic(arguments: argparse.Namespace) -> None:
    """One seed, one number of threads, no kernel whose result depends on timing.

    On CUDA, an operation that has no such kernel raises. Bits are those of one kind of GPU and one version
    of torch: others choose other kernels.
    """
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a tenth."""

    def factor(step: int) -> float:
        if step < WARM_UP_STEPS:
            return (step + 1) / WARM_UP_STEPS
        progress = min(1.0, (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS))
        return 0.55 + 0.45 * math.cos(math.pi * progress)

    return factor


def digests(state: object, name: str = "") -> dict[str, str]:
    """SHA-256 of every tensor's bytes, and every other leaf's text, by its path in the state."""
    if isinstance(state, torch.Tensor):
        raw = state.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return {name: hashlib.sha256(raw.tobytes()).hexdigest()}
    if isinstance(state, dict):
        children = state.items()
    elif isinstance(state, list | tuple):
        children = dict(enumerate(state)).items()
    else:
        return {name: repr(state)}
    found: dict[str, str] = {}
    for key, value in children:
        found.update(digests(value, f"{name}.{key}" if name else str(key)))
    return found


def state_of(owners: dict[str, Any]) -> dict[str, Any]:
    """The state of every owner, by its name."""
    return {name: owner.state_dict() for name, owner in owners.items()}


def generator_states(device: str) -> dict[str, Any]:
    """The state of every generator of torch; on CUDA, of every device."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device == "cuda" else [],
    }


def settle(device: str) -> None:
    """Wait until all work that was enqueued on the device is done, so that a clock tells the truth."""
    if device == "cuda":
        torch.cuda.synchronize()


def time_torch_save(owners: dict[str, Any], path: Path, device: str) -> float:
    """Seconds that training loses to a checkpoint written the usual way, made durable."""
    settle(device)  # what the step, or a save in flight, still has there is not torch.save's
    begin = time.perf_counter()
    with path.open("wb") as file:
        torch.save(state_of(owners), file)
        file.flush()
        os.fsync(file.fileno())
    settle(device)
    return time.perf_counter() - begin


class Log:
    """Appends JSON lines; each is on its way to the kernel before the next step starts."""

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = path.open("a", buffering=1) if path else None
        self._pending: list[SaveHandle] = []

    def write(self, event: str, **values: object) -> None:
        if self._file:
            self._file.write(json.dumps({"event": event, **values}) + "\n")

    def watch(self, handle: SaveHandle) -> None:
        """Report this save once it is durable."""
        self._pending.append(handle)

    def write_saves(self) -> None:
        """Write the reports of the saves that became durable."""
        for handle in [handle for handle in self._pending if handle.done()]:
            self._pending.remove(handle)
            report = handle.report
            self.write(
                "save",
                step=report.step,
                nbytes=report.nbytes,
                blocked_s=report.blocked_s,
                durable_s=report.durable_s,
                phases=report.phases,
            )


def main() -> None:
    arguments = parse_arguments()
    make_deterministic(arguments)
    corpus = read_stdlib_sources()
    config = GPTConfig()
    model = GPT(config).to(arguments.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.1)
    sched = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(arguments.steps))
    loader = WindowLoader(corpus, batch=arguments.batch, context=config.context, seed=arguments.seed)
    owners = {"model": model, "optimizer": optimizer, "lr_scheduler": sched, "dataloader": loader}

    console = Console()
    log = Log(arguments.log)
    ckpt = AsyncCheckpointer(
        arguments.root,
        model=model,
        optimizer=optimizer,
        lr_scheduler=sched,
        dataloader=loader,
        keep_last=3,
        layout=arguments.layout,
    )
    resume = ckpt.load_latest()
    start = resume.step if resume else 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"{parameters:,} parameters, {len(corpus):,} bytes of text, "
        + (f"resumed from step {start}" if resume else "from scratch")
    )
    log.write("start", resumed_from=start if resume else None, parameters=parameters, corpus=len(corpus))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=arguments.steps, completed=start)
        for step in range(start + 1, arguments.steps + 1):
            begin = time.perf_counter()
            inputs, targets = next(loader)
            optimizer.zero_grad(set_to_none=True)
            loss = model.loss(inputs.to(arguments.device), targets.to(arguments.device))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM_MAX)
            optimizer.step()
            sched.step()
            loss_value = float(loss.item())  # waits for the device: step_s is the whole of a step

            saved = step % arguments.save_every == 0
            if saved:
                log.watch(ckpt.save(step))  # returns at once
            torch_save_s = None
            if arguments.time_torch_save and step % arguments.save_every == arguments.save_every // 2:
                torch_save_s = time_torch_save(owners, arguments.time_torch_save, arguments.device)
            log.write(
                "step",
                step=step,
                loss=loss_value.hex(),
                step_s=time.perf_counter() - begin,
                saved=saved,
                torch_save_s=torch_save_s,
            )
            log.write_saves()
            progress.update(bar, completed=step, description=f"loss {loss_value:.3f}")
    ckpt.close()
    log.write_saves()

    if arguments.final:
        final = state_of(owners)
        final["rng"] = generator_states(arguments.device)
        arguments.final.write_text(json.dumps(digests(final), indent=1))


if __name__ == "__main__":
    main()
