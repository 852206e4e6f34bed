"""Jobs run in order, a lost one is tried again, and a status file says how far they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zept_nnunet.errors import ZePTError
from zept_nnunet.jobs import (
    Job,
    Progress,
    check,
    is_held,
    only_one,
    read_status,
    run_command,
    run_here,
    run_on_cluster,
    status_table,
)

LOCAL = {"timeout_min": 5}


def job(folder: Path, name: str, needs: tuple[str, ...] = (), script: str = "") -> Job:
    """Notes when it ran, then leaves its file."""
    text = (
        f"import time, pathlib; p = pathlib.Path({str(folder)!r}); "
        f"(p / 'order').open('a').write({name!r} + '\\n'); {script or 'pass'}; (p / {name!r}).write_text('done')"
    )
    command = (Path(sys.executable).name, "-c", text)
    return Job(name, f"purpose of {name}", command, folder / "done" / name, needs, folder / name)


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_jobs_run_one_after_the_other_and_what_is_done_is_left_out(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", ("a",)), job(tmp_path, "c", ("b",))]
    run_here(jobs[:2], tmp_path / "out", {})
    run_here(jobs, tmp_path / "out", {})
    assert order(tmp_path) == ["a", "b", "c"]
    assert {e["state"] for e in read_status(tmp_path / "out").values()} == {"done"}


def test_another_command_or_other_inputs_are_run_again_and_so_is_what_needs_them(tmp_path: Path) -> None:
    source, out = tmp_path / "weights.pth", tmp_path / "out"
    source.write_text("1")

    def jobs(script: str) -> list[Job]:
        first = replace(job(tmp_path, "a", script=script), inputs=(source,), folder=tmp_path / "made")
        return [first, job(tmp_path, "b", ("a",)), job(tmp_path, "c")]

    makes = "(p / 'made').mkdir(exist_ok=True); (p / 'made' / 'case').touch()"
    run_here(jobs(makes), out, {})
    run_here(jobs(makes), out, {})
    assert order(tmp_path) == ["a", "b", "c"]
    source.write_text("22")
    run_here(jobs(makes), out, {})
    assert order(tmp_path) == ["a", "b", "c", "a", "b"]
    run_here(jobs("pass"), out, {})  # what another command left is no longer there
    assert order(tmp_path)[5:] == ["a", "b"] and not (tmp_path / "made").exists()


def test_a_stale_result_is_not_taken_after_a_run_that_ended_between(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_here([job(tmp_path, "a"), job(tmp_path, "b", ("a",))], out, {})
    again = [job(tmp_path, "a", script="1"), job(tmp_path, "b", ("a",))]
    Progress(again, out)
    run_here(again[:1], out, {})
    run_here(again, out, {})
    assert order(tmp_path) == ["a", "b", "a", "b"]


def test_what_another_command_began_is_removed_and_what_this_one_began_stays(tmp_path: Path) -> None:
    made, python = tmp_path / "made", Path(sys.executable).name
    for digest, kept in (("1", False), ("1", True), ("2", False)):
        made.mkdir(exist_ok=True)
        (made / "case").touch()
        run_command((python, "-c", "pass"), {}, tmp_path / "done" / "a", None, digest, made)
        assert made.exists() == kept


def test_attempts_and_other_jobs_stay_in_the_status(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_here([job(tmp_path, "a")], out, {})
    run_here([job(tmp_path, "b")], out, {})
    run_here([job(tmp_path, "b")], out, {})
    assert {n: (e["state"], e["attempts"]) for n, e in read_status(out).items()} == {"a": ("done", 1), "b": ("done", 1)}
    (tmp_path / "done" / "a").unlink()
    run_here([job(tmp_path, "a")], out, {})
    assert read_status(out)["a"]["attempts"] == 2 and read_status(out)["b"]["attempts"] == 1


def test_a_command_that_fails_or_leaves_nothing_stops_it(tmp_path: Path) -> None:
    python = Path(sys.executable).name
    for code, words in (("raise SystemExit(3)", "exit status 3"), ("pass", "ended without")):
        broken = Job("x", "p", (python, "-c", code), tmp_path / "marker", (), tmp_path / "never")
        with pytest.raises(ZePTError, match=words):
            run_here([broken, job(tmp_path, "y", ("x",))], tmp_path / "out", {})
        states = {n: e["state"] for n, e in read_status(tmp_path / "out").items()}
        assert states == {"x": "failed", "y": "waiting"}


def test_jobs_that_could_never_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match="two jobs"):
        check([job(tmp_path, "a"), job(tmp_path, "a")])
    with pytest.raises(ZePTError, match="do not stand before it"):
        check([job(tmp_path, "a", ("b",)), job(tmp_path, "b")])


def test_what_needs_a_failed_job_is_skipped_however_far_away(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", ("a",)), job(tmp_path, "c", ("b",)), job(tmp_path, "d")]
    progress = Progress(jobs, tmp_path / "out")
    progress.set("a", "failed")
    progress.skip_what_cannot_run()
    assert progress.of("skipped") == ["b", "c"] and [j.name for j in progress.ready()] == ["d"]
    table = status_table(read_status(tmp_path / "out"))
    assert "1 waiting, 1 failed, 2 skipped" in table and "purpose of d" in table


def test_a_status_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ZePTError, match=r"status\.json cannot be read"):
        read_status(tmp_path)


def test_jobs_that_follow_later_are_listed_from_the_start(tmp_path: Path) -> None:
    out, later = tmp_path / "out", [job(tmp_path, "b")]
    run_here([job(tmp_path, "a")], out, {}, later)
    assert "1 waiting, 1 done" in status_table(read_status(out))
    run_here(later, out, {})
    Progress([job(tmp_path, "a")], out, later)
    assert {e["state"] for e in read_status(out).values()} == {"done"}


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    with only_one(tmp_path):
        assert is_held(tmp_path)
        with pytest.raises(ZePTError, match="another zept benchmark runs with -o"), only_one(tmp_path):
            pass
    assert not is_held(tmp_path)


def test_a_job_of_a_run_that_ended_is_waited_for_and_not_handed_over_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    out = tmp_path / "out"
    jobs = [job(tmp_path, "a", script="time.sleep(5)"), job(tmp_path, "b", ("a",))]
    executor = submitit.AutoExecutor(folder=str((out / "jobs").resolve()), cluster="local")
    executor.update_parameters(**LOCAL)
    a = jobs[0]
    handle = executor.submit(run_command, a.command, {}, a.done, a.output, a.digest(), a.folder)
    facts = {"cluster": "local", "job_id": handle.job_id, "digest": a.digest(), "log": "x"}
    Progress(jobs, out).set("a", "running", attempts=1, **facts)
    with pytest.raises(ZePTError, match="go on with --cluster local"):
        run_here(jobs, out, {})
    other = replace(a, command=(*a.command, "other"))
    with pytest.raises(ZePTError, match="a still runs as job"):
        run_on_cluster([other], out, {}, "local", LOCAL, say=lambda line: None)
    said: list[str] = []
    run_on_cluster(jobs, out, {}, "local", LOCAL, say=said.append)
    assert order(tmp_path) == ["a", "b"] and "of an earlier call still runs" in said[0]
    handle._process.wait()  # ours after all, in this test
    assert {n: (e["state"], e["attempts"]) for n, e in read_status(out).items()} == {"a": ("done", 1), "b": ("done", 1)}


def test_a_cluster_that_is_not_there_or_takes_no_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr("submitit.slurm.slurm.shutil.which", lambda name: None)
    with pytest.raises(ZePTError, match=r"(?s)--cluster slurm: .*where srun and sbatch are on PATH"):
        run_on_cluster([job(tmp_path, "a")], tmp_path / "out", {}, "slurm", {}, say=lambda line: None)

    def refuse(*args: Any) -> None:
        raise submitit.core.utils.FailedJobError("sbatch: error: invalid partition specified: gpuu")

    monkeypatch.setattr("submitit.local.local.LocalExecutor._internal_process_submissions", refuse)
    with pytest.raises(ZePTError, match=r"took none of \['a'\] .*invalid partition specified: gpuu"):
        run_on_cluster([job(tmp_path, "a")], tmp_path / "out", {}, "local", LOCAL, say=lambda line: None)
    assert read_status(tmp_path / "out")["a"]["state"] == "waiting"


@pytest.mark.parametrize(
    ("answer", "is_over"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("exit 0", True),
        ("echo '7 debug a R'", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_job_that_slurm_has_forgotten_is_tried_again_and_one_that_may_run_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, is_over: bool
) -> None:
    """Without a result and an entry in sacct, submitit takes it for one that is about to start."""
    pytest.importorskip("submitit")
    for command, text in (("squeue", answer), ("sacct", "echo 'JobID|State|NodeList'")):
        (tmp_path / command).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = tmp_path / "out"
    a = job(tmp_path, "a")
    facts = {"cluster": "slurm", "job_id": "7", "digest": a.digest(), "log": "x"}
    Progress([a], out).set("a", "running", attempts=1, **facts)
    progress = Progress([a], out)
    assert bool(progress.of_others(out / "jobs")) is not is_over
    assert progress.entries["a"]["state"] == ("waiting" if is_over else "running")


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    found = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE, text=True).stdout.split()
    return [p for child in map(int, found) for p in (child, *descendants(child))]


def kill_first(out: Path, name: str, begun: Path | None = None) -> None:
    """Kill the first attempt with all that it has started, as a node that goes down would; `begun`: not before it."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        try:
            entry = json.loads((out / "status.json").read_text())[name]
            pid = int(entry["job_id"]) if entry["state"] == "running" else 0
        except (OSError, KeyError, json.JSONDecodeError, ValueError):
            pid = 0
        if pid and (begun is None or begun.exists()):
            time.sleep(1.0)
            for process in [pid, *descendants(pid)]:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            return
        time.sleep(0.05)


def test_a_job_that_is_killed_is_tried_again_and_the_others_wait_for_it(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    slow = "time.sleep(0 if (p / 'again').exists() else 20 * (not (p / 'again').touch()))"
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "b", ("a",), slow),
        job(tmp_path, "c", ("b",)),
        job(tmp_path, "d", ("a",)),
    ]
    out = tmp_path / "out"
    killer = threading.Thread(target=kill_first, args=(out, "b", tmp_path / "again"))
    killer.start()
    run_on_cluster(jobs, out, {"ZEPT_X": "1"}, "local", LOCAL, say=lambda line: None)
    killer.join()
    ran = order(tmp_path)
    assert ran[0] == "a" and ran.count("b") == 2 and ran[-1] == "c" and ran.count("d") == 1
    entries = read_status(out)
    assert {e["state"] for e in entries.values()} == {"done"}
    assert (entries["b"]["attempts"], entries["d"]["attempts"]) == (2, 1)


def test_a_job_that_always_fails_is_given_up_with_its_log(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    broken = job(tmp_path, "a", script="raise SystemExit(2)")
    with pytest.raises(ZePTError, match=r"\['a'\] failed in 2 attempts each, 1 jobs") as error:
        run_on_cluster(
            [broken, job(tmp_path, "b", ("a",)), job(tmp_path, "c")], tmp_path / "out", {}, "local", LOCAL,
            retries=1, say=lambda line: None,
        )  # fmt: skip
    log = Path(read_status(tmp_path / "out")["a"]["log"])
    assert str(log) in str(error.value) and log.is_file()
    assert (tmp_path / "c").is_file() and not (tmp_path / "b").exists()


def test_parameters_that_submitit_does_not_know_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(ZePTError, match="submitit does not take"):
        run_on_cluster([job(tmp_path, "a")], tmp_path / "out", {}, "local", {"gpus_per_nod": 1}, say=lambda line: None)
