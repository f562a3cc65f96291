"""The sandbox's own processes: a small server that runs one untrusted command after the other, each in a fresh cell.

Started by `sandbox` with a clean environment; stdlib only. It reads JSON lines (first the setup, then one request per
run) and answers each with one line. The processes, from the outside in:

    server      once: namespaces without a network, a read-only root that shows only what the setup names
    keeper      per run: feeds the input, cuts the output, watches the clock, kills; the program cannot see it
    init        per run: process 1 of a PID namespace, so that its end is the end of everything started in it
    program     without privileges; a command, or a function of a module that the server has prepared

Each dies with the one above it, so that nothing outlives the process that asked for the run.
"""

# importing pathlib takes longer than a run of the sandbox
# ruff: noqa: PTH123, PTH208
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from types import ModuleType
from typing import Any

from pipeline.clock import LOOK_SECONDS, Meter
from stages.rewards.code import sandbox_kernel as kernel
from stages.rewards.code import sandbox_root as root

CHUNK = 65536
MAX_FILES_PER_MB = 64
"""Each file of a tmpfs costs kernel memory beside its content."""


def main() -> None:
    """Serve until the input ends."""
    setup = json.loads(sys.stdin.readline())
    _die_with(setup["parent"])
    os.umask(0o022)  # what is made here is for the program, which may be another user
    try:
        if os.geteuid() == 0:
            setup["user"] = root.own_user()
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # where memory runs out, the kernel ends sandboxes first
        # before the project is out of sight
        prepared = importlib.import_module(setup["prepared"]) if setup["prepared"] else None
        if setup["isolation"] == "full":
            root.enter_namespaces(setup)
        # nobody may look into this process and its forks: not its memory, not its file descriptors
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        _answer({"refused": f"{error.strerror}{place}"})
        return
    try:
        if prepared:
            _prepare(setup, prepared)
    except Exception as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
        return
    _answer({"ready": True})
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _keep(setup, json.loads(line), prepared)
        _, status = os.waitpid(child, 0)
        if status != 0:
            _answer({"error": f"the sandbox's keeper ended with wait status {status}"})


def _prepare(setup: dict[str, Any], module: ModuleType) -> None:
    """Let the module import what it needs, here where there is no network and nothing but a private directory."""
    os.environ.update(setup["environment"])
    if setup["isolation"] == "full":  # each run covers it
        flags = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", root.PRIVATE, "tmpfs", flags, f"size={setup['disk_mb']}m,mode=700")
        os.environ.update(HOME=root.PRIVATE, TMPDIR=root.PRIVATE)
    sys.path += setup["packages"]
    module.prepare()
    gc.freeze()  # a collection in one of the copies would touch, and so copy, every page


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _die_with(parent: int) -> None:
    """End with the parent, however it ends."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "die with the parent")
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def _keep(setup: dict[str, Any], request: dict[str, Any], prepared: ModuleType | None) -> None:
    """Run one command, answer, end."""
    server = os.getppid()
    try:
        _die_with(server)
        nothing = os.open("/dev/null", os.O_RDONLY)
        os.dup2(nothing, 0)  # the next requests are not for this process
        os.close(nothing)
        # without a PID namespace, what the program leaves behind becomes a child of this process
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
        if setup["isolation"] == "full":
            kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS | kernel.CLONE_NEWIPC, "namespaces of one run")
        _answer(_run(setup, request, prepared))
    except Exception as error:
        _answer({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _run(setup: dict[str, Any], request: dict[str, Any], prepared: ModuleType | None) -> dict[str, Any]:
    pipes = {name: os.pipe() for name in ("stdin", "stdout", "stderr", "report")}
    keeper = os.getpid()
    os.chdir("/proc")  # init covers it with one that shows nothing but its own cell
    child = os.fork()
    if child == 0:
        os.chdir("/")
        _init(setup, request, pipes, keeper, prepared)
    os.close(pipes["stdin"][0])
    for name in ("stdout", "stderr", "report"):
        os.close(pipes[name][1])
    ends = {name: pipes[name][0] for name in ("stdout", "stderr", "report")} | {"stdin": pipes["stdin"][1]}
    meter = Meter(child, ".")
    taken, ended = _exchange(ends, request, meter)
    seconds = meter.look()
    _kill_all(child)
    if ended == "exit":
        # what the program wrote last may still lie in the pipes; nobody can write more
        taken, ended = _drain(ends, taken, request["output_bytes"])
    # the first line: after "failed" follows that the program's process has ended
    report = json.loads(taken["report"].split(b"\n")[0] or b"{}")
    if "failed" in report:
        return {"error": report["failed"]}
    return {
        "ended": ended,
        "status": report.get("status"),
        "stdout": taken["stdout"].decode("utf-8", "replace"),
        "stderr": taken["stderr"].decode("utf-8", "replace"),
        "seconds": seconds,
    }


def _exchange(ends: dict[str, int], request: dict[str, Any], meter: Meter) -> tuple[dict[str, bytearray], str]:
    """Feed the input and take the output until the program ends, is late, or has written too much."""
    taken = {name: bytearray() for name in ("stdout", "stderr", "report")}
    names = {fd: name for name, fd in ends.items()}
    left = memoryview(request["stdin"].encode())
    poll = select.poll()
    for name, fd in ends.items():
        os.set_blocking(fd, False)
        poll.register(fd, select.POLLOUT if name == "stdin" else select.POLLIN)
    while meter.look() < request["seconds"]:
        for fd, _ in poll.poll(LOOK_SECONDS * 1000):
            name = names[fd]
            if name == "stdin":
                try:
                    left = left[os.write(fd, left[:CHUNK]) :]
                except BrokenPipeError:  # the program does not read on
                    left = left[:0]
                if not left:
                    poll.unregister(fd)
                    os.close(fd)
                continue
            data = os.read(fd, CHUNK)
            taken[name] += data
            if not data and name == "report":
                return taken, "exit"
            if not data:
                poll.unregister(fd)
            if name != "report" and len(taken[name]) > request["output_bytes"]:
                del taken[name][request["output_bytes"] :]
                return taken, "output"
    return taken, "timeout"


def _drain(ends: dict[str, int], taken: dict[str, bytearray], most: int) -> tuple[dict[str, bytearray], str]:
    for name in ("stdout", "stderr"):
        while len(taken[name]) <= most:
            try:
                data = os.read(ends[name], CHUNK)
            except BlockingIOError:  # somebody outside of the sandbox's reach still holds the other end
                break
            if not data:
                break
            taken[name] += data
        if len(taken[name]) > most:
            del taken[name][most:]
            return taken, "output"
    return taken, "exit"


def _kill_all(init: int) -> None:
    """Kill process 1, with which its namespace ends; without a namespace, every descendant."""
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    while True:
        # first stop them all: a fork bomb whose processes are killed one by one makes new ones in their places, while
        # stopped ones keep the places taken
        stopped: set[int] = set()
        while (found := _descendants(os.getpid())) - stopped:
            _signal(found, signal.SIGSTOP)
            stopped |= found
        _signal(found, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:  # orphans come to this process: none of them means no descendant
            return


def _descendants(parent: int) -> set[int]:
    found: set[int] = set()
    waiting = [parent]
    while waiting:
        try:
            for thread in os.listdir(f"/proc/{waiting[-1]}/task"):
                with open(f"/proc/{waiting[-1]}/task/{thread}/children", encoding="ascii") as file:
                    children = {int(child) for child in file.read().split()}
                waiting[:0] = children - found
                found |= children
        except OSError:  # it has ended
            pass
        waiting.pop()
    return found


def _signal(processes: set[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _init(
    setup: dict[str, Any],
    request: dict[str, Any],
    pipes: dict[str, tuple[int, int]],
    keeper: int,
    prepared: ModuleType | None,
) -> None:
    """Be process 1: start the program, reap orphans, report how the program ended, end."""
    report = pipes["report"][1]
    full = setup["isolation"] == "full"
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "die with the keeper")
        if os.getppid() not in (keeper, 0):  # 0: it is outside of this PID namespace
            os._exit(1)
        os.setsid()
        user = kernel.NOBODY if setup["user"] is None else setup["user"]
        place = _private_directory(setup, user, full)
        for name, text in request["files"].items():
            with open(f"{place}/{name}", "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
        program = os.fork()
        if program == 0:
            _become_program(setup, request, pipes, place, prepared)
        for pair in pipes.values():
            for fd in pair:
                if fd != report:
                    os.close(fd)
        while True:
            child, status = os.wait()
            if child == program:
                _report(report, {"status": os.waitstatus_to_exitcode(status)})
                os._exit(0)
    except Exception as error:
        _report(report, {"failed": f"{type(error).__name__}: {error}"})
    os._exit(1)


def _report(report: int, line: dict[str, Any]) -> None:
    os.write(report, json.dumps(line).encode() + b"\n")


def _private_directory(setup: dict[str, Any], user: int, full: bool) -> str:
    if not full:
        import tempfile

        place: str = tempfile.mkdtemp(dir=setup["scratch"])
        if setup["user"] is not None:
            os.chown(place, user, user)
        os.chdir(place)
        return place
    size, files = setup["disk_mb"], setup["disk_mb"] * MAX_FILES_PER_MB
    options = f"size={size}m,nr_inodes={files},mode=700,uid={user},gid={user}"
    kernel.mount("tmpfs", root.PRIVATE, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    # read-only: else the program could say that others are to be ended before it where memory runs out
    safe = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC | kernel.MS_RDONLY
    try:
        kernel.mount("proc", "/proc", "proc", safe, "hidepid=2,subset=pid")
    except OSError:
        # container engines cover parts of /proc, then the kernel allows no new one: the program gets none
        kernel.mount("tmpfs", "/proc", "tmpfs", safe, "size=4k")
    os.chdir(root.PRIVATE)
    return root.PRIVATE


def _become_program(
    setup: dict[str, Any],
    request: dict[str, Any],
    pipes: dict[str, tuple[int, int]],
    place: str,
    prepared: ModuleType | None,
) -> None:
    """Become the program: everything is given up, in this order."""
    report = pipes["report"][1]
    try:
        os.dup2(pipes["stdin"][0], 0)
        os.dup2(pipes["stdout"][1], 1)
        os.dup2(pipes["stderr"][1], 2)
        if setup["isolation"] == "process":
            os.setsid()
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "die with init")
        for name in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
            signal.signal(name, signal.SIG_DFL)  # Python ignores some, and exec would keep that
        _limit(setup, request)
        kernel.drop_bounding_set()
        if setup["user"] is not None:
            for fd in range(3):
                os.fchown(fd, setup["user"], setup["user"])  # else /dev/stdin and its like cannot be opened
            root.become(setup["user"])
        kernel.drop_capabilities()
        if setup["isolation"] == "process":
            # changing the user has cleared it
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "die with init")
        os.umask(0o077)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, "no new privileges")
        # without a network namespace no sockets at all; with one the usual kinds are harmless
        full = setup["isolation"] == "full"
        kernel.filter_system_calls((kernel.AF_UNIX, kernel.AF_INET, kernel.AF_INET6) if full else ())
        environment = {**setup["environment"], "HOME": place, "TMPDIR": place}
        if prepared:
            os.environ.update(environment)
            _call(prepared)
        os.execvpe(request["command"][0], request["command"], environment)
    except Exception as error:
        _report(report, {"failed": f"cannot start {request['command'][0]!r}: {type(error).__name__}: {error}"})
    os._exit(1)


def _call(prepared: ModuleType) -> None:
    """Run the module's function in place of a command, with the three standard descriptors only; then end."""
    os.closerange(3, 1 << 16)
    status = 1
    try:
        with open(0, encoding="utf-8", closefd=False) as sys.stdin:
            prepared.run()
        sys.stdout.flush()
        status = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _limit(setup: dict[str, Any], request: dict[str, Any]) -> None:
    megabyte = 1 << 20
    processes = setup["processes"]
    if setup["user"] is None:
        processes += _counted_already(setup["isolation"] == "full")
    limits = {
        resource.RLIMIT_AS: setup["memory_mb"] * megabyte,
        resource.RLIMIT_CPU: int(2 * request["seconds"]) + 1,  # the keeper's count comes first, so that it decides
        resource.RLIMIT_FSIZE: setup["disk_mb"] * megabyte,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: setup["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))


def _counted_already(full: bool) -> int:
    """Return how many tasks the kernel already counts for the user that the program will have."""
    if full:
        return 3  # server, keeper and init: a user namespace has a count of its own
    user, tasks = os.getuid(), 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                tasks += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:  # it has ended
            continue
    return tasks
