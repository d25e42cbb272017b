"""Kill a training job in the middle of a save, resume it, and prove that nothing was lost.

    1. reference   train without interruption
    2. interrupt   train again elsewhere; freeze the process while a save is on its way, look, SIGKILL it
    3. resume      start it again: `load_latest()` finds the newest step that is whole
    4. verdict     every loss and every final byte of state equals the reference's
    5. cost        what each save cost training, beside torch.save of the same state in the same run

Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo_report import RunLog, plot_step_times, save_table
from rich.console import Console

TRAINER = Path(__file__).resolve().with_name("train_gpt.py")
POLL_S = 0.0005  # arbitrary: well below the milliseconds that a save takes
console = Console()


@dataclass(frozen=True)
class Kill:
    """What lay in the root while the process was frozen, and then dead."""

    step: int
    visible: list[str]
    hidden: list[str]


@dataclass(frozen=True)
class Outcome:
    """What a run that reached its end leaves: its log, and the digest of every leaf of its state."""

    log: RunLog
    final: dict[str, str]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="(default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=10, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--layout", choices=("dcp", "megatron"), default="dcp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.steps < 4 * arguments.save_every:
        parser.error("--steps must hold at least four saves: some before the kill, some after")
    if arguments.device == "cuda":
        from train_gpt import why_no_cuda  # torch is imported here only for that question

        if reason := why_no_cuda():
            parser.error(f"--device cuda: {reason}")
    return arguments


class Run:
    """One training run: its directory, its log, and the command that starts it."""

    def __init__(self, arguments: argparse.Namespace, name: str, root: str, *extra: str) -> None:
        self.root = arguments.out / root
        self.log_path = arguments.out / f"{name}.jsonl"
        self.final_path = arguments.out / f"{name}.final.json"
        self.layout = arguments.layout
        self.command = [
            *(sys.executable, str(TRAINER), "--root", str(self.root)),
            *("--steps", str(arguments.steps), "--save-every", str(arguments.save_every)),
            *("--layout", arguments.layout, "--device", arguments.device, "--seed", str(arguments.seed)),
            *("--log", str(self.log_path), "--final", str(self.final_path), *extra),
        ]

    def finish(self) -> Outcome:
        """Run to the end."""
        subprocess.run(self.command, check=True)
        return Outcome(RunLog.read(self.log_path), json.loads(self.final_path.read_text()))

    def step_directory(self, step: int) -> str:
        return f"iter_{step:07d}" if self.layout == "megatron" else f"step-{step}"

    def listing(self) -> tuple[list[str], list[str]]:
        """Names of the directories in the root, visible and hidden."""
        if not self.root.is_dir():
            return [], []
        names = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        return [name for name in names if name[0] != "."], [name for name in names if name[0] == "."]

    def step_in_flight(self, steps: range) -> int | None:
        """A step of `steps` that is being written: its hidden directory exists, its final one does not."""
        visible, hidden = self.listing()
        for step in steps if hidden else ():
            final = self.step_directory(step)
            if final not in visible and any(is_attempt(name, final) for name in hidden):
                return step
        return None


def is_attempt(hidden: str, final: str) -> bool:
    """True for the directory in which the step `final` is being built, false for one being deleted."""
    return hidden.startswith(f".asyncckpt-tmp-{final}-")


def kill_in_the_middle_of_a_save(run: Run, steps: range) -> Kill:
    """Start `run`, SIGKILL it while one of `steps` is half written, and show that it was.

    The process is stopped first: what is looked at cannot change, so a save that was already over when
    the signal came is told apart from one in flight, and the next save is waited for instead.
    """
    process = subprocess.Popen(run.command)
    try:
        while process.poll() is None:
            if run.step_in_flight(steps) is None:
                time.sleep(POLL_S)
                continue
            process.send_signal(signal.SIGSTOP)
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            step = run.step_in_flight(steps)
            if step is None:  # it was committed between the look and the signal
                process.send_signal(signal.SIGCONT)
                continue
            process.kill()
            process.wait()
            console.show_cursor(True)  # the bar that was killed had hidden it
            visible, hidden = run.listing()
            return Kill(step, visible, hidden)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    raise SystemExit(f"the trainer ended by itself (status {process.returncode}) before a save was caught")


def show_kill(run: Run, kill: Kill) -> None:
    """Print what the killed save left behind; exits when the kill proves nothing."""
    final = run.step_directory(kill.step)
    if final in kill.visible or not any(is_attempt(name, final) for name in kill.hidden):
        raise SystemExit(f"the kill did not fall into the save of step {kill.step}: {kill}")
    console.print(f"SIGKILL while step {kill.step} was being written. What lies in {run.root} now:")
    console.print("  visible  " + ", ".join(kill.visible), highlight=False)
    console.print("  hidden   " + ", ".join(kill.hidden), highlight=False)
    console.print(f"There is no {final}: nothing can load the part of it that was written.")


def differences(reference: Outcome, interrupted: RunLog, resumed: Outcome) -> list[str]:
    """Every loss and leaf of the final state that is not the reference's, and every save that was lost."""
    found = []
    expected = reference.log.losses
    for name, log in (("before the kill", interrupted), ("after the resume", resumed.log)):
        found += [
            f"loss of step {step} {name}: {float.fromhex(loss)}, expected {float.fromhex(expected[step])}"
            for step, loss in log.losses.items()
            if loss != expected[step]
        ]
    trained = interrupted.losses.keys() | resumed.log.losses.keys()
    found += [f"step {step} was not trained" for step in sorted(expected.keys() - trained)]
    leaves = sorted(reference.final.keys() | resumed.final.keys())
    for name, log in (("reference", reference.log), ("resumed", resumed.log)):
        durable = {save.step for save in log.saves}
        found += [
            f"save of step {step}, {name} run: not durable" for step in log.saved if step not in durable
        ]
    found += [
        f"final state: {name}" for name in leaves if reference.final.get(name) != resumed.final.get(name)
    ]
    return found


def show_verdict(reference: Outcome, interrupted: RunLog, resumed: Outcome, kill: Kill) -> bool:
    """Print whether the resumed run equals the reference; True if it does."""
    wrong = differences(reference, interrupted, resumed)
    if resumed.log.resumed_from is None or resumed.log.resumed_from >= kill.step:
        wrong.append(f"resumed from {resumed.log.resumed_from}, killed in step {kill.step}")
    if wrong:
        console.print(f"[bold red]DIFFERENT from the uninterrupted run, {len(wrong)} difference(s):")
        for line in wrong[:20]:
            console.print(f"  {line}", highlight=False)
        return False
    console.print(
        f"[bold green]IDENTICAL, bit for bit.[/] Resumed from step {resumed.log.resumed_from} of "
        f"{max(reference.log.losses)}; {len(interrupted.losses)} losses before the kill, "
        f"{len(resumed.log.losses)} after the resume and {len(reference.final)} leaves of the final state "
        "(weights, moments, schedule, shuffle, random numbers) equal the uninterrupted run's."
    )
    return True


def main() -> int:
    arguments = parse_arguments()
    begin = time.monotonic()
    shutil.rmtree(arguments.out, ignore_errors=True)
    arguments.out.mkdir(parents=True)

    console.rule("1. reference: train without interruption")
    torch_save_path = arguments.out / "torch_save.pt"
    reference = Run(arguments, "reference", "reference", "--time-torch-save", str(torch_save_path)).finish()

    console.rule("2. the same again elsewhere, killed in the middle of a save")
    interrupted = Run(arguments, "interrupted", "interrupted")
    second_half = range(arguments.steps // 2, arguments.steps + 1)
    kill = kill_in_the_middle_of_a_save(interrupted, second_half)
    show_kill(interrupted, kill)
    interrupted_log = RunLog.read(interrupted.log_path)

    console.rule("3. resume")
    resumed = Run(arguments, "resumed", "interrupted").finish()

    console.rule("4. verdict")
    same = show_verdict(reference, interrupted_log, resumed, kill)

    console.rule("5. what the saves cost")
    console.print(save_table(reference.log))
    picture = arguments.out / "step_times.png"
    plot_step_times(reference.log, picture)
    console.print(f"Step times, saves marked: {picture}", highlight=False)
    console.print(f"{time.monotonic() - begin:.0f} s in all", highlight=False)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
