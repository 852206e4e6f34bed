"""Commands that wait for each other: one after the other here, or as jobs of a cluster through submitit.

No scheduler of our own: SLURM queues, and submitit's local executor runs processes. What is here is the order (a job is
handed over when those that it needs are done), the retry of a job that was lost, and a file that says how far all of it
is. Jobs that are ready together go as one array.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zept_nnunet.errors import ZePTError
from zept_nnunet.files import stamp, write_whole

LOCK = "running.lock"
STATUS = "status.json"
STATES = ("waiting", "running", "done", "failed", "skipped")
CLUSTERS = ("local", "slurm")
_NAP_S = 1.0


@dataclass(frozen=True)
class Job:
    """One command, and what tells a result of it from one of another command or other inputs.

    `done`: the file that stands there once it has ended well, and holds the digest of then. `output`: a file that it
    must have left by then. `inputs`: files and folders that its result comes from, besides those of jobs that it needs.
    `folder`: holds nothing but what the command makes, and is emptied where another command or other inputs began it.
    """

    name: str
    purpose: str
    command: tuple[str, ...]
    done: Path
    needs: tuple[str, ...] = ()
    output: Path | None = None
    inputs: tuple[Path, ...] = ()
    folder: Path | None = None

    def digest(self) -> str:
        """Of the command and its inputs as they are now."""
        content = [self.command, [_state_of(p) for p in self.inputs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def is_done(self) -> bool:
        """Whether this command has ended well before, on these inputs."""
        return _text_of(self.done) == self.digest()


def _state_of(path: Path) -> Any:
    """What changes with a file's content; of a folder, with any of its files. None where there is nothing."""
    if path.is_dir():
        return [[p.name, _state_of(p)] for p in sorted(path.iterdir()) if not p.is_dir()]
    if not path.is_file():
        return None
    if path.suffix in (".json", ".yaml"):  # small, and written anew without a change
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return stamp(path)


def _text_of(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold FOLDER/running.lock. The system lets go of it when this process ends, however it does.

    Raises:
        ZePTError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=2)  # --status may hold it for a moment
    try:
        lock.acquire()
    except Timeout as error:
        raise ZePTError(
            f"another zept benchmark runs with -o {folder} ({folder / LOCK} is held). Wait for it, or give another -o"
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process is in `only_one` of the folder."""
    if not (folder / LOCK).is_file():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


class Progress:
    """What each job is doing, in memory and in FOLDER/status.json.

    What the file says of other jobs stays there, and so do the attempts of earlier runs. `later`: jobs that a later
    `Progress` of this folder will be of; the file lists them from the start.
    """

    def __init__(self, jobs: Sequence[Job], folder: Path, later: Sequence[Job] = ()):
        check(jobs)
        self.jobs = {job.name: job for job in jobs}
        done: set[str] = set()
        for job in jobs:
            if done.issuperset(job.needs) and job.is_done():
                done.add(job.name)
            else:  # now, so that it is run again even if this run ends between what it needs and it
                job.done.unlink(missing_ok=True)
        self.path = folder / STATUS
        earlier = read_status(folder) if self.path.is_file() else {}
        self.others = {name: entry for name, entry in earlier.items() if name not in self.jobs}
        for job in later:
            self.others.setdefault(job.name, {"state": "waiting", "purpose": job.purpose, "attempts": 0})
        self.entries: dict[str, dict[str, Any]] = {
            job.name: {
                "state": "done" if job.name in done else "waiting",
                "purpose": job.purpose,
                "attempts": earlier.get(job.name, {}).get("attempts", 0),
            }
            for job in jobs
        }
        # handed to a cluster by a run that ended before they did
        self.left = {n: e for n, e in earlier.items() if n in self.jobs and n not in done and _may_run(e)}
        for name, entry in self.left.items():
            self.entries[name] |= {k: entry[k] for k in ("state", *_FACTS)}
        self.before = {name: entry["attempts"] for name, entry in self.entries.items()}
        self.write()

    def set(self, name: str, state: str, **facts: Any) -> None:
        """Change a job's state and note facts about it."""
        self.entries[name] |= {"state": state, **facts}
        self.write()

    def of_others(self, logs: Path) -> dict[str, Any]:
        """Jobs that an earlier run handed over and that still run → their handles; the rest of them wait again.

        Raises:
            ZePTError: one of them is another command by now.
        """
        found = {}
        for name, entry in self.left.items():
            handle = _handle(entry, logs)
            if _is_over(handle):
                # it may have ended since the markers were read
                self.set(name, "done" if self.jobs[name].is_done() else "waiting")
            elif entry["digest"] != self.jobs[name].digest():
                raise ZePTError(
                    f"{name} still runs as job {entry['job_id']} ({entry['cluster']}), with another command or on "
                    "other inputs. Wait for it or cancel it, then run this again"
                )
            else:
                found[name] = handle
        return found

    def attempts(self, name: str) -> int:
        """How often this run has begun a job."""
        return int(self.entries[name]["attempts"] - self.before[name])

    def of(self, *states: str) -> list[str]:
        """Names of the jobs in these states."""
        return [name for name, entry in self.entries.items() if entry["state"] in states]

    def ready(self) -> list[Job]:
        """Jobs that wait for nothing any more."""
        done = set(self.of("done"))
        return [self.jobs[name] for name in self.of("waiting") if done.issuperset(self.jobs[name].needs)]

    def skip_what_cannot_run(self) -> None:
        """Jobs that need a failed or skipped one are skipped."""
        lost = set(self.of("failed", "skipped"))
        for name in self.of("waiting"):  # in order, so that skipping carries on
            if lost & set(self.jobs[name].needs):
                lost.add(name)
                self.set(name, "skipped")

    def write(self) -> None:
        """Whole or not at all: another process may read it at any time."""
        write_whole(self.path, json.dumps(self.others | self.entries, indent=2) + "\n")


_FACTS = ("cluster", "job_id", "digest", "log")


def _may_run(entry: Mapping[str, Any]) -> bool:
    return entry.get("state") == "running" and all(fact in entry for fact in _FACTS)


def _handle(entry: Mapping[str, Any], logs: Path) -> Any:
    """submitit's handle of a job that another process handed over."""
    submitit = _submitit()
    if entry["cluster"] == "slurm":
        return submitit.SlurmJob(logs, entry["job_id"])
    return submitit.LocalJob(logs, entry["job_id"], process=_Process(int(entry["job_id"]), logs))


def _is_over(handle: Any) -> bool:
    """Whether a job has ended, or has left no result and SLURM has forgotten it: submitit takes the unknown for one
    that is about to start. The controller knows every job that waits or runs; what cannot be asked may still run.
    """
    if handle.done():
        return True
    if not isinstance(handle, _submitit().SlurmJob) or handle.state.upper() != "UNKNOWN":
        return False
    squeue = shutil.which("squeue")
    if squeue is None:
        return False
    asked = subprocess.run([squeue, "--noheader", f"--jobs={handle.job_id}"], capture_output=True, text=True)
    return "Invalid job id" in asked.stderr if asked.returncode else not asked.stdout.strip()


@dataclass(frozen=True)
class _Process:
    """As much of `subprocess.Popen` as submitit asks for, of a process that is no child of this one."""

    pid: int
    logs: Path

    def poll(self) -> int | None:
        """None while it runs. Its arguments are looked at, since another process may have its number by now."""
        found = subprocess.run(
            ["ps", "-ww", "-p", str(self.pid), "-o", "args="], stdout=subprocess.PIPE, text=True
        ).stdout
        return None if str(self.logs) in found else 0


def check(jobs: Sequence[Job]) -> None:
    """Refuse jobs that could never run.

    Raises:
        ZePTError: two have one name, or one needs a job that does not stand before it.
    """
    before: set[str] = set()
    for job in jobs:
        if job.name in before:
            raise ZePTError(f"two jobs are called {job.name!r}")
        missing = [n for n in job.needs if n not in before]
        if missing:
            raise ZePTError(f"the job {job.name!r} needs {missing}, which do not stand before it")
        before.add(job.name)


def read_status(folder: Path) -> dict[str, dict[str, Any]]:
    """What `Progress` has written.

    Raises:
        ZePTError: there is nothing.
    """
    try:
        entries: dict[str, dict[str, Any]] = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ZePTError(
            f"{folder / STATUS} cannot be read ({error}); was a benchmark started with -o {folder}?"
        ) from error
    return entries


def status_table(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One line a job, and how many are in each state."""
    width = max((len(name) for name in entries), default=0)
    lines = [
        f"{name:<{width}}  {entry['state']:<8} {entry['attempts']} attempts  {entry['purpose']}"
        + (f"  log: {entry['log']}" if entry.get("log") and entry["state"] in ("running", "failed") else "")
        for name, entry in entries.items()
    ]
    counts = {state: sum(e["state"] == state for e in entries.values()) for state in STATES}
    return "\n".join([*lines, ", ".join(f"{n} {state}" for state, n in counts.items() if n)])


def run_here(jobs: Sequence[Job], folder: Path, environment: Mapping[str, str], later: Sequence[Job] = ()) -> None:
    """One after the other, each command printed before it runs; what is done is left out. `later`: as `Progress`.

    Raises:
        ZePTError: a command ends with an error or leaves no result, or a job still runs on a cluster.
    """
    progress = Progress(jobs, folder, later)
    for name in progress.of_others((folder / "jobs").resolve()):
        entry = progress.left[name]
        raise ZePTError(
            f"{name} still runs as job {entry['job_id']} of an earlier call: go on with --cluster {entry['cluster']}, "
            "or cancel it first"
        )
    for number, job in enumerate(jobs, start=1):
        if progress.entries[job.name]["state"] == "done":
            continue
        print(f"\n=== [{number}/{len(jobs)}] {job.purpose}\n$ {shlex.join(job.command)}\n", flush=True)
        progress.set(job.name, "running", attempts=progress.entries[job.name]["attempts"] + 1)
        try:
            run_command(job.command, dict(environment), job.done, job.output, job.digest(), job.folder)
        except BaseException:
            progress.set(job.name, "failed")
            raise
        progress.set(job.name, "done")


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    done: Path,
    output: Path | None = None,
    digest: str = "",
    folder: Path | None = None,
) -> None:
    """Run a command of this Python's environment, then write `done`.

    Args:
        command, done, output, folder: as `Job`.
        environment: variables besides those of this process.
        digest: of the job, when it was handed over.

    Raises:
        ZePTError: it ends with an error, or leaves no result.
    """
    begun = done.with_name(f"{done.name}.begun")
    if folder is not None and folder.exists() and _text_of(begun) != digest:
        shutil.rmtree(folder)
    done.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(digest, encoding="utf-8")
    code = subprocess.run([executable(command[0]), *command[1:]], env={**os.environ, **environment}).returncode
    if code:
        raise ZePTError(f"{shlex.join(command)} ended with exit status {code}; its message stands above")
    if output is not None and not output.exists():
        raise ZePTError(f"{shlex.join(command)} ended without {output}")
    done.write_text(digest, encoding="utf-8")


def executable(name: str) -> str:
    """The command beside this Python, else whatever PATH finds.

    Raises:
        ZePTError: there is none.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ZePTError(f"wanted the command {name} beside {sys.executable} or on PATH. Install zept-nnunet with pip")
    return found


def run_on_cluster(
    jobs: Sequence[Job],
    folder: Path,
    environment: Mapping[str, str],
    cluster: str,
    parameters: Mapping[str, Any],
    retries: int = 2,
    at_once: int = 16,
    say: Callable[[str], None] = print,
    later: Sequence[Job] = (),
) -> None:
    """Hand the jobs over as they become ready, wait for them, and hand a lost one over again.

    Args:
        folder: for status.json and submitit's files (logs among them); every node must see it.
        environment: of the commands.
        cluster: one of `CLUSTERS`.
        parameters: of submitit's executor (`timeout_min`, `gpus_per_node`, `slurm_partition`, …).
        retries: of each job, after its first attempt.
        at_once: jobs that run side by side.
        say: takes a line for the terminal.
        later: as `Progress`.

    Raises:
        ZePTError: submitit is not installed, the cluster is not there or takes no job, a job failed in every attempt,
            or an earlier run's job of that name still runs with another command.
    """
    submitit = _submitit()
    logs = (folder / "jobs").resolve()
    try:
        executor = submitit.AutoExecutor(folder=str(logs), cluster=cluster)
    except RuntimeError as error:
        raise ZePTError(
            f"--cluster {cluster}: {error} Run this where srun and sbatch are on PATH (a login node), or give "
            "--cluster local"
        ) from error
    try:
        executor.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ZePTError(f"submitit does not take {dict(parameters)}: {error}") from error
    progress = Progress(jobs, folder, later)
    running = progress.of_others(logs)
    for name in running:
        say(f"{name}: job {progress.left[name]['job_id']} of an earlier call still runs")
    while True:
        progress.skip_what_cannot_run()
        ready = progress.ready()[: max(0, at_once - len(running))]
        if ready:
            digests = {j.name: j.digest() for j in ready}
            try:
                with executor.batch():
                    handed = [
                        executor.submit(
                            run_command, j.command, dict(environment), j.done, j.output, digests[j.name], j.folder
                        )
                        for j in ready
                    ]
            except (RuntimeError, OSError) as error:
                still = {n: progress.entries[n]["job_id"] for n in running}
                raise ZePTError(
                    f"{cluster} took none of {[j.name for j in ready]} with {dict(parameters)}: {_reason(error)}. Mend "
                    f"--parameter and run the same command again; it takes up the jobs that still run: {still}"
                ) from error
            for job, handle in zip(ready, handed, strict=True):
                attempts = progress.entries[job.name]["attempts"] + 1
                log = str(handle.paths.stderr)
                facts = {"cluster": cluster, "job_id": str(handle.job_id), "digest": digests[job.name], "log": log}
                progress.set(job.name, "running", attempts=attempts, **facts)
                running[job.name] = handle
                say(f"{job.name}: attempt {attempts}, job {handle.job_id}\n  $ {shlex.join(job.command)}")
        if not running:
            break
        for name, handle in list(running.items()):
            if _is_over(handle):
                del running[name]
                _finish(progress, name, handle, retries, say)
        time.sleep(_NAP_S)
    failed = progress.of("failed")
    if failed:
        skipped, log = len(progress.of("skipped")), progress.entries[failed[0]]["log"]
        raise ZePTError(
            f"{failed} failed in {progress.attempts(failed[0])} attempts each, {skipped} jobs that need them were left "
            f"out. Log of the first: {log}. Mend the reason and run the same command again"
        )


def _finish(progress: Progress, name: str, handle: Any, retries: int, say: Callable[[str], None]) -> None:
    """A job that is over: done, to be tried again, or failed."""
    error = None
    try:
        # of a forgotten job submitit would wait for the result for ever
        error = handle.exception() if handle.done() else ZePTError(f"SLURM knows no job {handle.job_id}")
    except Exception as problem:  # submitit's own, where a job left no result behind
        error = problem
    if error is None and progress.jobs[name].is_done():
        progress.set(name, "done")
        say(f"{name}: done")
    elif progress.attempts(name) <= retries:
        progress.set(name, "waiting")
        say(f"{name}: lost ({_reason(error)}); once more")
    else:
        progress.set(name, "failed", error=str(error))
        say(f"{name}: failed ({_reason(error)})")


def _reason(error: BaseException | None) -> str:
    """The line of submitit's long message that says what was raised, or its last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if line.startswith("zept_nnunet.errors.")]
    return (raised or lines or [type(error).__name__])[-1][:300]


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ZePTError('--cluster wants submitit: pip install "zept-nnunet[cluster]"') from error
    return submitit
