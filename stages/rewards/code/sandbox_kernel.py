"""What the sandbox asks of Linux: namespaces, mounts, capabilities, a filter of system calls. Child side, stdlib only.

Called in the sandbox's own small processes, never in the process that uses the sandbox. Every function raises OSError
with the step that failed.
"""

import ctypes
import os
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL, SECCOMP_MODE_FILTER = 4, 2
SYS_MOUNT_SETATTR = 442  # the same number on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
NOBODY = 65534

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Audit number of the architecture, and its column in the tables below."""
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
SYSTEM_CALLS = {
    # memory that no limit of a process counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "io_uring_setup": (425, 425),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # namespaces and mounts: their privileges open much of the kernel
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # parts of the kernel that a test program has no use for
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "finit_module": (313, 273),
}
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
EPERM, ENOSYS, EAFNOSUPPORT = 1, 38, 97

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, step: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{step}: {os.strerror(number)}")


def prctl(option: int, value: int = 0, step: str = "prctl") -> None:
    """Call prctl with one value; the others are 0."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), step)


def unshare(flags: int, step: str) -> None:
    """Give this process namespaces of its own."""
    _check(_libc.unshare(flags), step)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount something."""
    arguments = [text.encode() for text in (source, target, kind)]
    _check(_libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None), f"mount {kind or source} {target}")


def bind(source: str, target: str, *, device: bool = False) -> None:
    """Show a file or a tree of the machine at ``target``, read-only with everything mounted beneath it."""
    mount(source, target, flags=MS_BIND | MS_REC)
    attributes = MS_RDONLY | MS_NOSUID | (0 if device else MS_NODEV)  # same bits as the MOUNT_ATTR_ of the newer call
    request = struct.pack("QQQQ", attributes, 0, 0, 0)
    number = ctypes.c_long(SYS_MOUNT_SETATTR)
    path = target.encode()
    _check(
        _libc.syscall(number, AT_FDCWD, path, AT_RECURSIVE, request, ctypes.c_size_t(len(request))),
        f"make {target} read-only",
    )


def pivot_root(new: str, old: str) -> None:
    """Make ``new`` the root; the former root lies at ``old``, which is beneath ``new``."""
    _check(_libc.pivot_root(new.encode(), old.encode()), "pivot_root")


def detach(target: str) -> None:
    """Unmount a tree."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def drop_bounding_set() -> None:
    """Take away every capability that a later exec could bring back; before the user is changed."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:  # past the last one; or a user without privileges, whom no_new_privs holds
            break


def drop_capabilities() -> None:
    """Give up every capability: effective, permitted, inheritable and ambient."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, "clear the ambient capabilities")
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, nothing), "drop the capabilities")


def filter_system_calls(families: tuple[int, ...]) -> None:
    """Refuse `SYSTEM_CALLS`, user namespaces, and sockets of other families; kept by everything this process starts.

    Raises:
        OSError: on an architecture whose numbers are not known here.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(ENOSYS, f"filter system calls: not known for the architecture {machine}")
    audit, column = ARCHITECTURES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000

    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    # the x32 numbers of x86_64 would pass by the table
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse | ENOSYS)]
    for numbers in SYSTEM_CALLS.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | EPERM)]
    # clone3 hides its flags behind a pointer; without it the C library uses clone
    program += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, refuse | ENOSYS)]
    program += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, CLONE_NEWUSER)]
    program += [(give, 0, 0, refuse | EPERM), (give, 0, 0, allow)]
    program += [(equal, 0, 2 + 2 * len(families), SOCKET[column]), (load, 0, 0, 16)]
    for family in families:
        program += [(equal, 0, 1, family), (give, 0, 0, allow)]
    program += [(give, 0, 0, refuse | EAFNOSUPPORT), (give, 0, 0, allow)]

    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    zero = ctypes.c_ulong(0)
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    _check(_libc.prctl(PR_SET_SECCOMP, mode, header, zero, zero), "filter system calls")
