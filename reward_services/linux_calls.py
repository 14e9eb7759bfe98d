"""The Linux system calls that the sandbox needs and Python lacks, through ctypes.

Numbers are those of x86-64; elsewhere nothing here may be used. A call that fails is an OSError
that names it.
"""

from __future__ import annotations

import ctypes
import os
import struct

NEW_USER, NEW_PID, NEW_NET, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
NEW_MOUNTS, NEW_HOST_NAME, NEW_CGROUP, NEW_TIME = 0x00020000, 0x04000000, 0x02000000, 0x00000080
_ANY_NAMESPACE = (
    NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_MOUNTS | NEW_HOST_NAME | NEW_CGROUP | NEW_TIME
)
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18  # of mount(2)
NO_SUID, NO_DEVICES = 2, 4
READ_ONLY = 1  # of mount_setattr(2), where 2 and 4 mean the same as above
_DETACH = 2
_DEATH_SIGNAL, _DUMPABLE, _SECCOMP, _DROP_BOUND, _NO_NEW_PRIVILEGES = 1, 4, 22, 24, 38
_LAST_CAPABILITY = 63
_PIVOT_ROOT, _CAPSET, _MOUNT_SETATTR = 155, 126, 442

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
_libc.syscall.restype = ctypes.c_long


def unshare(flags: int) -> None:
    """Leave the namespaces of the host."""
    _checked("unshare", _libc.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)"""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    result = _libc.mount(*words, flags, data.encode())
    _checked(f"mount of {kind or source} on {target}", result)


def set_mount_flags(path: str, flags: int, *, recursive: bool) -> None:
    """Add READ_ONLY and the like to a mount; takes none away."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    result = _libc.syscall(
        _MOUNT_SETATTR, -100, path.encode(), 0x8000 if recursive else 0, attributes, 32
    )
    _checked(f"mount_setattr of {path}", result)


def enter_root(path: str) -> None:
    """Make a mount the root, and let go of the old one."""
    os.chdir(path)
    _checked("pivot_root", _libc.syscall(_PIVOT_ROOT, b".", b"."))
    _checked("umount of the host's root", _libc.umount2(b".", _DETACH))
    os.chdir("/")


def die_with_parent() -> None:
    """SIGKILL when the parent is gone; a change of user resets it."""
    _prctl(_DEATH_SIGNAL, 9)


def set_dumpable(dumpable: bool) -> None:
    """Whether a process of the same user may look into this one."""
    _prctl(_DUMPABLE, int(dumpable))


def bound_capabilities() -> None:
    """Nothing that starts from here on can gain a privilege that this process does not have."""
    for capability in range(_LAST_CAPABILITY + 1):
        if _libc.prctl(_DROP_BOUND, capability, 0, 0, 0) < 0 and ctypes.get_errno() != 22:
            _checked("dropping capabilities", -1)  # 22: this kernel has no such capability


def drop_capabilities() -> None:
    """Give up every privilege, for good."""
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    _checked("capset", _libc.syscall(_CAPSET, header, none))
    _prctl(_NO_NEW_PRIVILEGES, 1)


def filter_system_calls() -> None:
    """Refuse what a program that computes never needs; holds for all that it starts."""
    code = _filter_program()
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    program_buffer = ctypes.create_string_buffer(program, len(program))
    _prctl(_SECCOMP, 2, ctypes.addressof(program_buffer))


# What reaches into other processes, the kernel, keys, clocks, mounts and namespaces; and what holds
# memory that no limit of the process counts: shared segments, files without a folder, queues, pages
# and open files that lie in a pipe or a socket, watches.
_REFUSED = {
    "shmget": 29,
    "shmat": 30,
    "shmctl": 31,
    "socket": 41,  # pairs remain; what waits to be accepted holds what was sent
    "sendmsg": 46,  # the way of open files into a socket
    "listen": 50,
    "semget": 64,
    "semop": 65,
    "semctl": 66,
    "shmdt": 67,
    "msgget": 68,
    "msgsnd": 69,
    "msgrcv": 70,
    "msgctl": 71,
    "ptrace": 101,
    "syslog": 103,
    "personality": 135,
    "ustat": 136,
    "sysfs": 139,
    "pivot_root": 155,
    "adjtimex": 159,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "create_module": 174,
    "init_module": 175,
    "delete_module": 176,
    "quotactl": 179,
    "nfsservctl": 180,
    "io_setup": 206,
    "remap_file_pages": 216,
    "semtimedop": 220,
    "clock_settime": 227,
    "mbind": 237,
    "set_mempolicy": 238,
    "mq_open": 240,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "inotify_init": 253,
    "migrate_pages": 256,
    "unshare": 272,
    "splice": 275,
    "tee": 276,
    "vmsplice": 278,
    "move_pages": 279,
    "inotify_init1": 294,
    "perf_event_open": 298,
    "fanotify_init": 300,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "sendmmsg": 307,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "memfd_create": 319,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "quotactl_fd": 443,
    "landlock_create_ruleset": 444,
    "memfd_secret": 447,
}
_CLONE, _CLONE3, _SOCKETPAIR, _PRLIMIT, _PRCTL = 56, 435, 53, 302, 157
_FUTEX_HASH = 78  # of prctl: a table in the kernel, of any size
_LOCAL, _STREAM, _KIND_BITS = 1, 1, 0xF  # AF_UNIX, SOCK_STREAM, beside flags
_X86_64, _FIRST_X32_CALL = 0xC000003E, 0x40000000
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EACCES = 1, 38, 13
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
# Offsets in struct seccomp_data.
_CALL_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT, _SECOND_ARGUMENT_AT = 0, 4, 16, 24


def _filter_program() -> bytes:
    """Classic BPF: each line (code, value, lines to skip if true, if false)."""
    lines = [
        (_LOAD, _ARCHITECTURE_AT, 0, 0),
        (_IF_EQUAL, _X86_64, 1, 0),
        (_RETURN, _KILL, 0, 0),
        (_LOAD, _CALL_AT, 0, 0),
        (_IF_AT_LEAST, _FIRST_X32_CALL, 0, 1),
        (_RETURN, _KILL, 0, 0),
    ]
    for number in _REFUSED.values():
        lines += [(_IF_EQUAL, number, 0, 1), (_RETURN, _ERROR | _EPERM, 0, 0)]
    lines += [
        # clone3 hides its flags from a filter; without it the C library falls back to clone.
        (_IF_EQUAL, _CLONE3, 0, 1),
        (_RETURN, _ERROR | _ENOSYS, 0, 0),
        (_IF_EQUAL, _CLONE, 0, 4),
        (_LOAD, _FIRST_ARGUMENT_AT, 0, 0),
        (_IF_ANY_BIT, _ANY_NAMESPACE, 0, 1),
        (_RETURN, _ERROR | _EPERM, 0, 0),
        (_RETURN, _ALLOW, 0, 0),
        # Limits of other processes, such as process 1; 0 is the process itself.
        (_IF_EQUAL, _PRLIMIT, 0, 4),
        (_LOAD, _FIRST_ARGUMENT_AT, 0, 0),
        (_IF_EQUAL, 0, 1, 0),
        (_RETURN, _ERROR | _EPERM, 0, 0),
        (_RETURN, _ALLOW, 0, 0),
        (_IF_EQUAL, _PRCTL, 0, 4),
        (_LOAD, _FIRST_ARGUMENT_AT, 0, 0),
        (_IF_EQUAL, _FUTEX_HASH, 0, 1),
        (_RETURN, _ERROR | _EPERM, 0, 0),
        (_RETURN, _ALLOW, 0, 0),
        # A pair of streams holds no more than its two buffers; datagrams outlive their sender.
        (_IF_EQUAL, _SOCKETPAIR, 0, 6),
        (_LOAD, _FIRST_ARGUMENT_AT, 0, 0),
        (_IF_EQUAL, _LOCAL, 0, 3),
        (_LOAD, _SECOND_ARGUMENT_AT, 0, 0),
        (_AND, _KIND_BITS, 0, 0),
        (_IF_EQUAL, _STREAM, 1, 0),
        (_RETURN, _ERROR | _EACCES, 0, 0),
        (_RETURN, _ALLOW, 0, 0),
    ]
    return b"".join(struct.pack("HBBI", code, yes, no, value) for code, value, yes, no in lines)


def _prctl(option: int, first: int, second: int = 0) -> None:
    _checked(f"prctl {option}", _libc.prctl(option, first, second, 0, 0))


def _checked(what: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
