"""The namespaces and the root directory that the sandbox's server moves to. Child side, stdlib only.

The root is built from nothing: what is not named does not exist in it.
"""

# importing pathlib takes longer than a run of the sandbox
# ruff: noqa: PTH102, PTH103, PTH106, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211
import os
from typing import Any

from stages.rewards.code import sandbox_kernel as kernel

DEVICES = ("null", "zero", "full", "random", "urandom")
PRIVATE = "/sandbox"
"""The program's own directory; /tmp leads to it."""


def own_user() -> int | None:
    """Return a user id that no other running sandbox has, or null where only one is mapped.

    The kernel counts processes per user: two sandboxes with one user would fail by each other's processes.
    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [tuple(int(number) for number in line.split()) for line in file]
    first, _, count = max(ranges, key=lambda entry: entry[2])
    if count < 3:
        return None
    half = count // 2
    return first + half + os.getpid() % half


def enter_namespaces(setup: dict[str, Any]) -> None:
    """Move this process to namespaces and a root of its own; sets the setup's ``user`` to the program's."""
    flags = (
        kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWCGROUP
    )
    try:
        if setup["user"] is None:
            raise PermissionError("no other user to change to")
        kernel.unshare(flags, "namespaces")
    except PermissionError:
        if setup["user"] is not None:
            # root without CAP_SYS_ADMIN: in a user namespace it would still be the root that no process limit binds
            try:
                become(setup["user"])
            except PermissionError as error:
                step = "namespaces: this root has neither CAP_SYS_ADMIN nor CAP_SETUID and CAP_SETGID"
                raise OSError(error.errno, step) from error
            kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        _enter_user_namespace(flags)
        setup["user"] = None
    _make_root(setup)


def _enter_user_namespace(flags: int) -> None:
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(flags | kernel.CLONE_NEWUSER, "a user namespace with mount, network, IPC, UTS and cgroup namespaces")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{kernel.NOBODY} {user} 1"),
        ("gid_map", f"{kernel.NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def become(user: int) -> None:
    """Change to a user and the group of the same number, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _make_root(setup: dict[str, Any]) -> None:
    """Replace the root by an empty one that shows, read-only, the system's programs and what the setup names."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/machine")
    kernel.pivot_root("/tmp", "/tmp/machine")
    os.chdir("/")
    for path in setup["readable"]:
        _show(path)
    for path in setup["hidden"]:
        if os.path.isdir(path):
            kernel.mount("tmpfs", path, "tmpfs", kernel.MS_RDONLY, "size=4k,mode=755")
    for name in ("/proc", "/dev", PRIVATE):
        os.makedirs(name, exist_ok=True)
    if not os.path.lexists("/tmp"):  # it exists where something within it is shown
        os.symlink(PRIVATE, "/tmp")
    # a user namespace may mount its own /proc only where one is visible already; each run covers it
    kernel.bind("/machine/proc", "/proc")
    for name in DEVICES:
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.bind(f"/machine/dev/{name}", f"/dev/{name}", device=True)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")
    os.symlink(PRIVATE, "/dev/shm")
    kernel.detach("/machine")
    os.rmdir("/machine")
    read_only = kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("none", "/", flags=read_only)


def _show(path: str) -> None:
    """Show a path of the machine at the same place of the new root; what does not exist is left out."""
    source = "/machine" + path
    if os.path.lexists(path) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    kernel.bind(source, path)
