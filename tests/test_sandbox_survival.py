"""What outlives a run (nothing), and the sandbox where the machine grants less."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.errors import RewardError
from stages.rewards.code.sandbox import PROJECT, Isolation, Limits, Sandbox, python
from tests.processes import until
from tests.sandboxes import attack, processes_with, reachable_python


@pytest.fixture
def marker() -> str:
    return f"marker-{uuid4().hex}"


DAEMON = """
    import os, signal, subprocess, sys, time
    for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
    time.sleep(0.2)
"""


def test_a_daemon_ends_with_the_run(marker: str) -> None:
    run = attack(DAEMON, marker)
    assert (run.ended, run.exit_code) == ("exit", 0)
    assert processes_with(marker) == []


def start_and_kill(marker: str, isolation: Isolation, interpreter: str, program: str) -> None:
    """Start a process that uses a sandbox, kill it with -9 while the program runs."""
    code = f"""
        from stages.rewards.code.sandbox import Limits, Sandbox
        with Sandbox(Limits(seconds=100), {isolation!r}) as sandbox:
            sandbox.run([{interpreter!r}, "program.py", {marker!r}], {{"program.py": {textwrap.dedent(program)!r}}})
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=PROJECT)
    # the worker has the marker in its own command line
    assert until(lambda: len(processes_with(marker)) >= 2)
    worker.kill()
    worker.wait()


def test_nothing_survives_when_the_user_of_the_sandbox_is_killed(marker: str) -> None:
    start_and_kill(marker, "full", python(), DAEMON + "    time.sleep(300)\n")
    assert until(lambda: processes_with(marker) == [])


# --- where less is to be had

NO_NAMESPACES = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'


def without_namespaces(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where the kernel denies user namespaces."""
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", NO_NAMESPACES, "sh", sys.executable, "-c"]
    return subprocess.run(
        [*command, textwrap.dedent(code)], cwd=PROJECT, capture_output=True, text=True, timeout=600, check=False
    )


def test_a_machine_without_namespaces_is_refused_with_the_way_out() -> None:
    done = without_namespaces("from stages.rewards.code.sandbox import Sandbox\nwith Sandbox(): print('entered')")
    assert "entered" not in done.stdout
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("pipeline.errors.RewardError: this machine does not allow the sandbox (a user namespace")
    assert 'isolation = "process"' in message


def test_less_isolation_works_without_namespaces() -> None:
    code = """
        from stages.rewards.code.sandbox import Sandbox
        with Sandbox(isolation="process") as sandbox:
            print(sandbox.run(["sh", "-c", "pwd; echo $API_KEY; ulimit -v"]).stdout)
    """
    done = without_namespaces(code)
    place, memory = done.stdout.split()
    assert (Path(place).exists(), memory) == (False, str(512 * 1024)), done.stderr


def test_an_unknown_isolation_is_refused() -> None:
    with pytest.raises(RewardError, match="isolation is 'none'"):
        Sandbox(isolation="none").__enter__()  # type: ignore[arg-type]


def test_less_isolation_still_limits_and_has_no_network() -> None:
    program = """
        import os, resource, socket, sys
        print(*sorted(os.environ)[:2], sorted(os.listdir("/proc/self/fd"))[:3])
        try:
            socket.socket()
        except OSError:
            print("no socket")
        print(open("/proc/self/status").read().split("NoNewPrivs:")[1].split()[0])
        x = bytearray(1 << 30)
    """
    run = attack(program, isolation="process", interpreter=reachable_python())
    assert run.stdout.splitlines() == ["HOME LANG ['0', '1', '2']", "no socket", "1"]
    assert "MemoryError" in run.stderr


def test_less_isolation_still_ends_daemons_and_fork_bombs(marker: str) -> None:
    interpreter = reachable_python()
    assert attack(DAEMON, marker, isolation="process", interpreter=interpreter).ended == "exit"
    assert processes_with(marker) == []
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    run = attack(bomb, marker, isolation="process", interpreter=interpreter, limits=Limits(seconds=1))
    assert run.ended == "timeout"
    assert until(lambda: processes_with(marker) == [])


def test_less_isolation_leaves_no_program_when_its_user_is_killed(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path("/var/tmp") / marker  # the killed process cannot remove its temporary directory
    place.mkdir(mode=0o711)
    monkeypatch.setenv("TMPDIR", str(place))
    try:
        start_and_kill(marker, "process", reachable_python(), "import time\ntime.sleep(300)")
        assert until(lambda: processes_with(marker) == [])
    finally:
        shutil.rmtree(place)


def test_an_ordinary_user_has_the_same_protection_through_a_user_namespace() -> None:
    if os.getuid() != 0:
        pytest.skip("this user is an ordinary one: every other test of this file has shown it")
    interpreter = reachable_python()
    place = Path("/var/tmp") / f"sandbox-test-{uuid4().hex}"
    place.mkdir(mode=0o755)
    try:
        for name in ("pipeline", "stages"):
            shutil.copytree(PROJECT / name, place / name)
        code = """
            from stages.rewards.code.sandbox import Limits, Sandbox
            program = '''
            import os, socket
            print(os.getpid(), os.getuid(), os.path.exists('/etc/shadow'), os.path.exists('/var'))
            fields = open('/proc/self/status').read()
            print(fields.split('CapEff:')[1].split()[0], fields.split('CapBnd:')[1].split()[0])
            try:
                open('/usr/new', 'w')
            except OSError as error:
                print(error.strerror)
            try:
                open('/proc/self/oom_score_adj', 'w').write('0')
            except OSError as error:
                print(error.strerror)
            try:
                socket.create_connection(('127.0.0.1', 1))
            except OSError as error:
                print(error.strerror)
            forks = 0
            try:
                while os.fork() or os.read(0, 1):
                    forks += 1
            except BlockingIOError:
                print(forks)
            '''
            import textwrap
            with Sandbox(Limits(processes=4)) as sandbox:
                run = sandbox.run(["python3", "-u", "program.py"], {"program.py": textwrap.dedent(program)})
                print(run.stdout, run.stderr)
        """
        done = subprocess.run(
            [interpreter, "-c", textwrap.dedent(code)],
            cwd=place,
            env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin"},
            user=41234,
            group=41234,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    finally:
        shutil.rmtree(place)
    assert done.stdout.split("\n")[:6] == [
        "2 65534 False False",
        "0000000000000000 0000000000000000",
        "Read-only file system",
        "Read-only file system",
        "Network is unreachable",
        "3",
    ], done.stdout + done.stderr
