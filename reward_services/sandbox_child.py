"""What stands between the host and a generated program: the sandbox, built from inside.

Three processes: the outer one leaves the host's namespaces, becomes another user, and watches the
time from where no signal of the program reaches; process 1 of the new world waits and takes
everything with it when it ends; the program runs below it, without privileges. Whatever step fails
ends in an error and no program. Standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from reward_services import linux_calls as linux

# Users that no distribution hands out; which one is chance, so that runs do not share a quota.
_FIRST_USER, _NUM_USERS = 59_000, 1000
_INNER_USER = 1000
_NEW_ROOT = "/tmp"  # exists everywhere; covered in the sandbox's own view only
_SCRATCH, _PROGRAM = "/tmp", "/program"
_SYSTEM_FOLDERS = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/dev/full")
_NUM_OPEN_FILES = 64
LINK_FD = 3  # where a program finds its connection, if it has one


def main(settings_fd: int, status_fd: int, link_fd: int) -> NoReturn:
    """Run the program that the settings describe; the status pipe tells how it ended."""
    os.set_inheritable(status_fd, False)
    try:
        with open(settings_fd, "rb") as file:
            settings = json.load(file)
        os.umask(0o022)
        # If memory runs short all the same, the kernel ends this before anything else of the host.
        Path("/proc/self/oom_score_adj").write_text("1000")
        if settings["isolation"] == "none":
            linux.die_with_parent()
            signal.alarm(_watch_s(settings))
            _start_and_wait(settings, status_fd, link_fd)
        _leave_host(settings)
        inner = os.fork()
        if inner == 0:
            linux.die_with_parent()
            _start_and_wait(settings, status_fd, link_fd)
        # Asked to stop, wait for the end of all: nobody else may be there to bury process 1.
        for signum in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(signum, lambda *_: os.kill(inner, signal.SIGKILL))
        signal.alarm(_watch_s(settings))
        os.close(status_fd)
        os.waitpid(inner, 0)
    except BaseException as error:
        _tell(status_fd, {"error": f"{error}"})
    os._exit(0)


def _watch_s(settings: Mapping[str, Any]) -> int:
    """The parent ends us before that; should it fail to, an alarm does."""
    return int(settings["wall_s"]) + 5


def _leave_host(settings: Mapping[str, Any]) -> None:
    if platform.machine() != "x86_64":
        raise OSError(f"the filter of system calls is for x86-64, and this is {platform.machine()}")
    is_root = os.getuid() == 0
    if is_root:
        os.setgroups([])
    mapped = _root_mapper() if is_root else _self_mapper(os.getuid(), os.getgid())
    linux.unshare(
        linux.NEW_USER
        | linux.NEW_MOUNTS
        | linux.NEW_PID
        | linux.NEW_NET
        | linux.NEW_IPC
        | linux.NEW_HOST_NAME
        | linux.NEW_CGROUP
    )
    mapped()
    _build_root(settings)
    linux.bound_capabilities()
    os.setresgid(_INNER_USER, _INNER_USER, _INNER_USER)
    os.setresuid(_INNER_USER, _INNER_USER, _INNER_USER)
    linux.die_with_parent()  # here, as a change of user resets it


def _self_mapper(user: int, group: int) -> Callable[[], None]:
    """Anybody may give their own user another number, and no more."""

    def mapped() -> None:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{_INNER_USER} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{_INNER_USER} {group} 1")

    return mapped


def _root_mapper() -> Callable[[], None]:
    """Root maps a user that nobody has, and itself, to pass through private folders when mounting.

    The maps have to be written from outside, by a process that waits for us to have left.
    """
    pid, user = os.getpid(), _FIRST_USER + os.getpid() % _NUM_USERS
    left, leave = os.pipe()
    writer = os.fork()
    if writer == 0:
        try:
            os.close(leave)
            if os.read(left, 1):
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{_INNER_USER} {user} 1\n")
                os._exit(0)
        finally:
            os._exit(1)
    os.close(left)

    def mapped() -> None:
        with open(leave, "wb") as pipe:
            pipe.write(b"x")
        if os.waitpid(writer, 0)[1] != 0:
            raise OSError("the user of the sandbox could not be mapped")

    return mapped


def _build_root(settings: Mapping[str, Any]) -> None:
    """A root in memory that holds the system, read-only, and one small folder to write to."""
    linux.mount("none", "/", None, linux.RECURSIVE | linux.PRIVATE)
    sources = _opened_sources(settings)
    flags = linux.NO_SUID | linux.NO_DEVICES
    linux.mount("tmpfs", _NEW_ROOT, "tmpfs", flags, "mode=0755,size=16m")
    for path, fd in sources.items():
        _show(path, fd)
        os.close(fd)
    for name in _SYSTEM_FOLDERS:
        if os.path.islink(name):
            os.symlink(os.readlink(name), _NEW_ROOT + name)
    program = Path(_NEW_ROOT + _PROGRAM)
    program.mkdir()
    for name, text in settings["files"].items():
        (program / name).parent.mkdir(exist_ok=True)
        (program / name).write_bytes(text.encode(errors="surrogatepass"))
    os.makedirs(_NEW_ROOT + _SCRATCH, exist_ok=True)
    linux.enter_root(_NEW_ROOT)
    linux.set_mount_flags("/", linux.READ_ONLY, recursive=False)
    owner = f"uid={_INNER_USER},gid={_INNER_USER},mode=0700"
    size = f"size={settings['scratch_mb']}m,nr_inodes=4096"
    linux.mount("tmpfs", _SCRATCH, "tmpfs", flags, f"{owner},{size}")


def _opened_sources(settings: Mapping[str, Any]) -> dict[str, int]:
    """Handles on what will be visible, as the new root will cover some of their paths."""
    folders = [f for f in _SYSTEM_FOLDERS if os.path.isdir(f) and not os.path.islink(f)]
    folders += ["/usr", settings["python_folder"], *settings["folders"]]
    files = [f for f in (*_DEVICES, "/etc/ld.so.cache") if os.path.exists(f)]
    return {
        path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in dict.fromkeys(folders + files)
    }


def _show(path: str, fd: int) -> None:
    source, target = f"/proc/self/fd/{fd}", _NEW_ROOT + path
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
        flags = linux.READ_ONLY | linux.NO_SUID | linux.NO_DEVICES
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        Path(target).touch()
        flags = linux.READ_ONLY | linux.NO_SUID
    linux.mount(source, target, None, linux.BIND | linux.RECURSIVE)
    linux.set_mount_flags(target, flags, recursive=True)


def _start_and_wait(settings: Mapping[str, Any], status_fd: int, link_fd: int) -> NoReturn:
    """As process 1: when this ends, the kernel ends everything in the sandbox."""
    # A process 1 ignores, whoever of its world sends it, each signal that has no handler; the
    # interpreter comes with one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    linux.set_dumpable(False)  # the program cannot look into us; its own exec sets it anew
    program = os.fork()
    if program == 0:
        _become_program(settings, status_fd, link_fd)
    try:
        while (ended := os.wait())[0] != program:
            pass
        _tell(status_fd, {"exit": os.waitstatus_to_exitcode(ended[1])})
    finally:  # an error is told only of what comes before the program
        os._exit(0)


def _become_program(settings: Mapping[str, Any], status_fd: int, link_fd: int) -> NoReturn:
    try:
        signal.alarm(0)  # the program's alarms are its own
        isolated = settings["isolation"] != "none"
        if isolated:  # else its process group is all that it can be found by
            os.setsid()
        folder = _SCRATCH if isolated else settings["scratch"]
        program = _PROGRAM if isolated else folder
        os.chdir(folder)
        status_fd = _kept_fds(status_fd, link_fd)
        _limit(settings, isolated)
        if isolated:
            linux.drop_capabilities()
            linux.filter_system_calls()
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": folder,
            "TMPDIR": folder,
            "LANG": "C.UTF-8",
            "OPENBLAS_NUM_THREADS": "1",  # else its threads fill the address space
            "OMP_NUM_THREADS": "1",
        }
        command = [settings["python"], "-I", "-B", "-X", "utf8", f"{program}/{settings['main']}"]
        _tell(status_fd, {"started": True})
        os.execve(command[0], command, environment)
    except BaseException as error:
        _tell(status_fd, {"error": f"{error}"})
        os._exit(1)


def _kept_fds(status_fd: int, link_fd: int) -> int:
    """Close all but the standard streams, the link and the status pipe, which may get a new number.

    The status pipe is not inherited: it closes when the program starts.
    """
    first = LINK_FD
    if link_fd >= 0:
        status_fd = os.dup(status_fd) if status_fd == LINK_FD else status_fd
        if link_fd != LINK_FD:
            os.dup2(link_fd, LINK_FD)
        os.set_inheritable(LINK_FD, True)
        first += 1
    os.closerange(first, status_fd)
    os.closerange(status_fd + 1, os.sysconf("SC_OPEN_MAX"))
    return status_fd


def _limit(settings: Mapping[str, Any], isolated: bool) -> None:
    seconds, memory = int(settings["cpu_s"]) + 1, settings["memory_mb"] << 20
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: settings["scratch_mb"] << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _NUM_OPEN_FILES,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: _NUM_OPEN_FILES,
        resource.RLIMIT_STACK: min(memory, 64 << 20),
    }
    if isolated:  # else it would count whatever the user runs anywhere
        limits[resource.RLIMIT_NPROC] = settings["processes"] + 2  # the two of ours
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _tell(status_fd: int, message: Mapping[str, object]) -> None:
    os.write(status_fd, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
