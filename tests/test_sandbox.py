"""The sandbox under attack: each test is a program that tries something, run for real."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.errors import RewardError
from stages.rewards.code.sandbox import PROJECT, Sandbox, python
from tests.sandboxes import NO_SUCH_FILE, attack, tried

# --- what an honest program gets


def test_a_program_reads_its_input_and_gives_its_output_and_exit_status() -> None:
    run = attack("import sys\nprint(input()[::-1])\nprint('oh', file=sys.stderr)\nsys.exit(3)", stdin="abc\n")
    assert (run.ended, run.exit_code, run.stdout, run.stderr) == ("exit", 3, "cba\n", "oh\n")


def test_the_end_by_a_signal_is_a_negative_exit_status() -> None:
    assert attack("import os\nos.abort()").exit_code == -signal.SIGABRT


def test_output_that_is_not_text_is_replaced() -> None:
    assert attack("import os\nos.write(1, b'a\\xff\\0b')").stdout == "a\ufffd\0b"


def test_a_large_input_that_nobody_reads_does_no_harm() -> None:
    assert attack("print(1)", stdin="x" * 3_000_000).stdout == "1\n"


def test_a_large_input_arrives_whole() -> None:
    assert attack("import sys\nprint(len(sys.stdin.read()))", stdin="x" * 3_000_000).stdout == "3000000\n"


def test_dev_stdin_can_be_read() -> None:
    assert attack("print(open('/dev/stdin').read())", stdin="abc").stdout == "abc\n"


def test_it_works_where_new_files_are_private_to_their_user() -> None:
    former = os.umask(0o077)
    try:
        assert attack("print(1)").stdout == "1\n"
    finally:
        os.umask(former)


def test_every_run_starts_in_an_empty_directory() -> None:
    with Sandbox() as sandbox:
        sandbox.run(["touch", "left"])
        assert sandbox.run(["ls", "-A"], {"new": ""}).stdout == "new\n"


def test_a_command_that_does_not_exist_is_one_clear_error() -> None:
    with Sandbox() as sandbox, pytest.raises(RewardError, match=r"cannot start 'no-such-program'.*correct `command`"):
        sandbox.run(["no-such-program"])


def test_a_path_named_readable_can_be_read_but_not_written(tmp_path: Path) -> None:
    (tmp_path / "given").write_text("seen")
    tmp_path.chmod(0o755)  # the program is another user
    with Sandbox(readable=[str(tmp_path)]) as sandbox:
        assert sandbox.run(["cat", f"{tmp_path}/given"]).stdout == "seen"
        assert "Read-only" in sandbox.run(["touch", f"{tmp_path}/new"]).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_it_works_from_several_threads_of_a_process_with_limited_memory() -> None:
    code = """
        import resource, threading
        from stages.rewards.code.sandbox import Sandbox
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
        def run(number):
            with Sandbox() as sandbox:
                print(sandbox.run(["echo", str(number)]).stdout.strip() + "\\n", end="", flush=True)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == ["0", "1", "2", "3"]


# --- reading


@pytest.mark.parametrize(
    "path", [str(PROJECT), __file__, f"{PROJECT}/stages/rewards/code/code.py", "/etc/shadow", "/etc/passwd", "/home"]
)
def test_the_machines_files_are_not_there(path: str) -> None:
    assert tried("os.stat(path)", path=path) == [NO_SUCH_FILE]


def test_the_run_directory_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "rewards.parquet").write_text("expected")
    assert tried("os.listdir(path)", path=str(tmp_path)) == [NO_SUCH_FILE]


def test_the_working_directory_is_hidden_even_within_a_folder_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    (run_directory / "secret").write_text("expected")
    (tmp_path / "tool").write_text("seen")
    tmp_path.chmod(0o755)
    monkeypatch.chdir(run_directory)
    with Sandbox(readable=[str(tmp_path)]) as sandbox:
        assert sandbox.run(["ls", "-A", str(tmp_path)]).stdout == "run\ntool\n"
        assert sandbox.run(["ls", "-A", str(run_directory)]).stdout == ""


def test_a_working_directory_above_what_is_shown_hides_nothing_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    assert attack("print(1)").stdout == "1\n"


def test_home_directories_hold_nothing_but_the_interpreter() -> None:
    seen = attack("import os\nprint([e for e in os.listdir('/') if not os.path.islink('/' + e)])").stdout
    allowed = {"dev", "tmp", "sandbox", "proc", "etc", "usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}
    assert set(eval(seen)) - allowed <= {Path(sys.base_prefix).resolve().parts[1]}
    prefix = Path(sys.base_prefix).resolve()
    top = "/" + prefix.parts[1]
    walk = attack(f"import os\nfor place, _, files in os.walk({top!r}):\n    print(place, len(files))")
    others = [line for line in walk.stdout.splitlines() if not line.startswith(str(prefix))]
    assert others == [f"{place} 0" for place in reversed(prefix.parents) if place.is_relative_to(top)]


def test_other_processes_cannot_be_seen() -> None:
    run = attack("import os\nprint(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()), os.getpid())")
    assert run.stdout == "[2] 2\n"
    parent = os.getpid()
    assert tried("open('/proc/1/environ').read()", "open(path).read()", path=f"/proc/{parent}/environ") == [
        NO_SUCH_FILE,
        NO_SUCH_FILE,
    ]


def test_the_kernels_settings_cannot_be_seen() -> None:
    assert tried("os.listdir('/proc/sys')", "os.listdir('/sys')") == [NO_SUCH_FILE, NO_SUCH_FILE]


def test_the_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    names = attack("import os\nprint(*sorted(os.environ))").stdout.split()
    assert names == [
        "HOME",
        "LANG",
        "MKL_NUM_THREADS",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "PYTHONHASHSEED",
        "PYTHONUTF8",
        "TMPDIR",
    ]


def test_file_descriptors_are_not_inherited(tmp_path: Path) -> None:
    with (tmp_path / "secret").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        run = attack(
            "import os\nfor fd in range(64):\n    try:\n        os.fstat(fd)\n        print(fd)\n    except OSError: 0"
        )
    assert run.stdout.split() == ["0", "1", "2"]


# --- writing


def test_nothing_but_the_private_directory_can_be_written() -> None:
    places = ["/", "/usr", "/usr/lib", "/etc", "/dev", "/proc", sys.base_prefix, "/var/tmp"]
    tries = [f"open({place + '/new'!r}, 'w')" for place in places]
    assert set(tried(*tries)) <= {"OSError", "PermissionError", NO_SUCH_FILE}
    assert tried("open('/tmp/new', 'w')", "open('/dev/null', 'w').write('x')") == ["done", "done"]


def test_a_program_stays_the_first_to_be_ended_where_memory_runs_out() -> None:
    program = """
        print(open("/proc/self/oom_score_adj").read().strip())
        for place in ("/proc/self/oom_score_adj", "/proc/self/oom_adj", "/proc/1/oom_score_adj", "/proc/self/comm"):
            try:
                open(place, "w").write("0")
                print("written", place)
            except OSError as error:
                print(type(error).__name__)
        print(open("/proc/self/oom_score_adj").read().strip())
    """
    seen = attack("open('/dev/stdout', 'w').write('seen ')\n" + textwrap.dedent(program)).stdout.split()
    assert (seen[0], seen[1], seen[-1]) == ("seen", "1000", "1000")
    assert set(seen[2:-1]) <= {"OSError", "PermissionError", NO_SUCH_FILE}


def test_files_of_the_system_cannot_be_changed() -> None:
    assert set(tried(f"os.chmod({python()!r}, 0o777)", f"os.utime({python()!r})")) <= {"OSError", "PermissionError"}


def test_a_link_to_a_file_of_the_machine_leads_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("expected")
    lines = ("os.symlink(path, 'link')", "open('link').read()", "open('link', 'w')", "os.link(path, 'hard')")
    assert tried(*lines, path=str(secret)) == ["done", NO_SUCH_FILE, NO_SUCH_FILE, NO_SUCH_FILE]
    assert secret.read_text() == "expected"


# --- network


def test_no_listener_of_the_machine_can_be_reached() -> None:
    name = f"\0{uuid4().hex}"
    with socket.create_server(("127.0.0.1", 0)) as inet, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(name)
        abstract.listen()
        with socket.create_connection(inet.getsockname()):  # it does listen
            pass
        assert tried(
            "socket.create_connection(address, timeout=2)",
            "socket.socket(socket.AF_UNIX).connect(name)",
            "socket.create_connection(('1.1.1.1', 53), timeout=2)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
            address=inet.getsockname(),
            name=name,
        ) == ["OSError", "ConnectionRefusedError", "OSError", "OSError"]


def test_sockets_that_no_namespace_holds_are_refused() -> None:
    families = ("AF_VSOCK", "AF_NETLINK", "AF_PACKET", "AF_ALG")
    assert tried(*(f"socket.socket(socket.{family}, socket.SOCK_RAW)" for family in families)) == ["OSError"] * 4


# --- privileges and other processes


def test_no_privilege_is_left_or_can_be_won() -> None:
    status = attack("print(open('/proc/self/status').read())").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert [int(fields[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Amb")] == [0, 0, 0, 0]
    assert int(fields["CapBnd"], 16) == 0
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")
    assert set(fields["Uid"].split()) & {"0", str(os.getuid())} == set()
    lines = ("os.setuid(0)", "os.setgid(0)", "os.setgroups([0])", "os.chroot('/tmp')")
    assert set(tried(*lines)) <= {"PermissionError", "OSError"}


def test_dangerous_system_calls_are_refused() -> None:
    lines = [
        f"assert ctypes.CDLL(None).{call} >= 0"
        for call in (
            "unshare(0x10000000)",
            "ptrace(0, 0, 0, 0)",
            "mount(0, b'/tmp', b'tmpfs', 0, 0)",
            "syscall(321, 0)",
        )
    ]
    assert tried(*lines) == ["AssertionError"] * 4


def test_signals_reach_no_process_outside() -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        lines = ("os.kill(other, 9)", "os.kill(1, 9)", "os.killpg(group, 9)")
        found = tried(*lines, other=sleeper.pid, group=os.getpgid(sleeper.pid))
        assert found[0] == "ProcessLookupError"
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_killing_everybody_kills_nobody_else() -> None:
    assert attack("import os, signal\nos.kill(-1, signal.SIGKILL)").stderr.endswith(
        "ProcessLookupError: [Errno 3] No such process\n"
    )
