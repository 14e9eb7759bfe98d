"""Hostile programs against the sandbox: none gets what it is after, and the host stays as it was.

Each program prints SUCCESS if its attack worked. Skipped only where the host isolates nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_services.sandbox import Program, RunReport, Sandbox
from reward_services.sandbox_config import SandboxConfig

CONFIG = SandboxConfig(time_s=2, memory_mb=256, processes=6, scratch_mb=4, output_kb=64)
MISSING = Sandbox(CONFIG).missing()
isolated = pytest.mark.skipif(MISSING is not None, reason=f"no isolation on this host: {MISSING}")
FIRST_SANDBOX_USER = 59_000  # where covey runs as root; else the sandbox has the user's own number


def run(source: str, *, cpu_s: float = 15, stdin: bytes = b"input\n") -> RunReport:
    files = {"main.py": source}
    return Sandbox(CONFIG).run(Program(files=files, main="main.py", stdin=stdin), cpu_s=cpu_s)


def sandboxed_processes() -> list[str]:
    """Command lines of living processes that belong to a sandbox."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if "/program/" in command:
            found.append(command)
    return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Things on the host that an attack may look for, and checks that all are as before."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the host's secret")
    victim = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    server = socket.create_server(("127.0.0.1", 0))
    os.environ["COVEY_TEST_TOKEN"] = "token of the host"
    names_in_tmp = set(os.listdir("/tmp"))
    yield {
        "SECRET": str(secret),
        "FOLDER": str(tmp_path),
        "VICTIM": str(victim.pid),
        "PARENT": str(os.getpid()),
        "PORT": str(server.getsockname()[1]),
        "HERE": str(Path(__file__).parents[2]),
    }
    assert victim.poll() is None, "the attack ended a process of the host"
    assert secret.read_text() == "the host's secret"
    assert list(tmp_path.iterdir()) == [secret]
    assert not any("covey_attack" in name for name in set(os.listdir("/tmp")) - names_in_tmp)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    victim.communicate(b"\n")
    del os.environ["COVEY_TEST_TOKEN"]
    assert sandboxed_processes() == []


# name -> (program, how its end may be reported). Names in capitals are filled in by `host`.
ATTACKS: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True: os.fork()", {"failed", "time"}),
    "fork bomb that hides its errors": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        {"time"},
    ),
    "thread bomb": (
        "import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()",
        {"failed", "time"},
    ),
    "memory": ("x = bytearray(10**9)\nprint('SUCCESS')", {"failed"}),
    "memory by small pieces": ("x = []\nwhile True: x.append('a' * 10**6)", {"failed"}),
    "memory mapped": (
        "import mmap\nm = mmap.mmap(-1, 10**9)\nprint('SUCCESS')",
        {"failed"},
    ),
    "endless output": ("while True: print('x' * 1000)", {"output"}),
    "endless errors": (
        "import sys\nwhile True: sys.stderr.write('x' * 1000)",
        {"output"},
    ),
    "a sleep past the limit": ("import time\ntime.sleep(1000)\nprint('SUCCESS')", {"time"}),
    "a busy loop": ("while True: pass", {"time"}),
    "ignoring signals": (
        "import signal\nfor s in range(1, 65):\n"
        "  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
        "while True: pass",
        {"time"},
    ),
    "a child that outlives its parent": (
        "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(1000)\nprint('done')",
        {"finished"},
    ),
    "a daemon that keeps the output open": (
        "import os, signal, time\nif os.fork() == 0:\n  os.setsid()\n"
        "  if os.fork() == 0:\n    signal.signal(15, signal.SIG_IGN)\n    time.sleep(1000)\n"
        "  os._exit(0)\nprint('done')",
        {"finished"},
    ),
    "network: the host's loopback": (
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)\nprint('SUCCESS')",
        {"failed"},
    ),
    "network: outside": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('8.8.8.8', 53))\nprint('SUCCESS')",
        {"failed"},
    ),
    "network: raw and netlink sockets": (
        "import socket\nfor f, k in ((16, 3), (17, 3), (10, 1)):\n"
        "  try: socket.socket(f, k); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "network: a socket through a system call": (
        "import ctypes\nprint('SUCCESS' if ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0 else 'no')",
        {"finished"},
    ),
    "reading the user's files": ("print(open('SECRET').read())\nprint('SUCCESS')", {"failed"}),
    "reading the system's secrets": (
        "for p in ('/etc/shadow', '/etc/passwd', '/etc/hostname', '/root' '/.bashrc',\n"
        "          '/home', '/run', '/var', '/sys/kernel', 'HERE'):\n"
        "  import os\n"
        "  try: os.listdir(p) if os.path.isdir(p) else open(p).read()\n"
        "  except OSError: continue\n"
        "  print('SUCCESS', p)",
        {"finished"},
    ),
    "reading the environment": (
        "import os\nprint('SUCCESS' if 'token of the host' in str(os.environ) else 'no')",
        {"finished"},
    ),
    "reading the environment of others": (
        "import os\nfor p in (1, os.getppid(), VICTIM, PARENT):\n"
        "  try: print('SUCCESS', open(f'/proc/{p}/environ').read())\n  except OSError: pass",
        {"finished"},
    ),
    "looking around in /proc": (
        "import os\nprint('SUCCESS' if os.path.exists('/proc/self') else 'no')",
        {"finished"},
    ),
    "writing to the host": (
        "for p in ('FOLDER/covey_attack', '/covey_attack', '/usr/covey_attack',\n"
        "          '/etc/covey_attack',\n"
        "          '/program/main.py', '/dev/covey_attack', 'SECRET', '/dev/shm/covey_attack'):\n"
        "  try: open(p, 'w').write('x')\n  except OSError: continue\n"
        "  print('SUCCESS', p)",
        {"finished"},
    ),
    "changing what it runs on": (
        "import os, sys\nfor call in (lambda: os.chmod('/usr/bin/env', 0o777),\n"
        "  lambda: os.unlink(os.__file__), lambda: os.rename('/usr', '/tmp/usr'),\n"
        "  lambda: os.chown('/usr', 1000, 1000), lambda: os.utime(sys.executable)):\n"
        "  try: call(); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "filling the scratch folder": (
        "with open('big', 'wb') as f:\n  for _ in range(1000): f.write(b'x' * 10**6); f.flush()\n"
        "print('SUCCESS')",
        {"failed"},
    ),
    "filling the scratch folder with many files": (
        "for i in range(100000):\n  open(f'f{i}', 'w').write('x' * 4000)\nprint('SUCCESS')",
        {"failed"},
    ),
    "symbolic links out of the scratch folder": (
        "import os\nfor t in ('SECRET', '/proc/1/root', 'FOLDER', '/../../..FOLDER/secret.txt'):\n"
        "  os.symlink(t, 'link')\n"
        "  try: print('SUCCESS', (os.listdir if os.path.isdir('link') else open)('link'))\n"
        "  except OSError: pass\n"
        "  os.unlink('link')",
        {"finished"},
    ),
    "hard links": (
        "import os\nfor t in ('SECRET', '/usr/bin/env'):\n"
        "  try: os.link(t, 'hard'); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "climbing out of the root": (
        "import os\nos.mkdir('d')\ntry: os.chroot('d')\nexcept OSError: pass\n"
        "for _ in range(50): os.chdir('..')\n"
        "print('SUCCESS' if os.path.exists('.SECRET') else 'no')",
        {"finished"},
    ),
    "open folders left by the parent": (
        "import os\nfor fd in range(3, 256):\n"
        "  try: print('SUCCESS', fd, os.fstat(fd))\n  except OSError: pass",
        {"finished"},
    ),
    "killing the parent": (
        "import os\nfor p in (os.getppid(), 1, VICTIM, PARENT, -1):\n"
        "  for s in (9, 15, 19):\n"
        "    try: os.kill(p, s)\n    except OSError: pass\n"
        "print('still here')",
        {"finished", "failed", "time"},  # -1 and SIGSTOP may hit itself
    ),
    "tracing other processes": (
        "import ctypes, os\nc = ctypes.CDLL(None)\n"
        "for p in (1, os.getppid(), VICTIM):\n"
        "  if c.ptrace(16, p, 0, 0) == 0 or c.ptrace(0x4206, p, 0, 0) == 0: print('SUCCESS')\n"
        "b = ctypes.create_string_buffer(8)\n"
        "v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
        "r = (ctypes.c_size_t * 2)(id(v), 8)\n"
        "if c.process_vm_readv(1, v, 1, r, 1, 0) > 0: print('SUCCESS')",
        {"finished"},
    ),
    "becoming root": (
        "import os\nfor call in (lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0),\n"
        "  lambda: os.setgid(0), lambda: os.setgroups([0])):\n"
        "  try: call(); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "a set-uid program": (
        "import os, stat\nfrom pathlib import Path\n"
        "for name in ('su', 'mount', 'passwd', 'sudo'):\n"
        "  p = Path('/usr/bin', name)\n"
        "  if p.exists() and not os.statvfs(p).f_flag & os.ST_NOSUID: print('SUCCESS', p)",
        {"finished"},
    ),
    "new namespaces": (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "for f in (0x10000000, 0x00020000, 0x40000000):\n"
        "  if c.unshare(f) == 0: print('SUCCESS')\n"
        "if c.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0: print('SUCCESS')\n"
        "if c.syscall(435, 0, 88) >= 0: print('SUCCESS')",
        {"finished"},
    ),
    "mounting": (
        "import ctypes, os\nc = ctypes.CDLL(None)\nos.mkdir('m')\n"
        "for k in (b'tmpfs', b'proc', b'sysfs'):\n"
        "  if c.mount(b'x', b'm', k, 0, None) == 0: print('SUCCESS')\n"
        "if c.umount2(b'/usr', 2) == 0: print('SUCCESS')\n"
        "if c.mount(b'', b'/', None, 32, None) == 0: print('SUCCESS')",
        {"finished"},
    ),
    "kernel interfaces": (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "for n in (321, 298, 323, 425, 250, 248, 246, 169, 304, 101):\n"
        "  if c.syscall(n, 0, 0, 0, 0, 0) >= 0: print('SUCCESS', n)",
        {"finished"},
    ),
    "system calls of 32-bit programs": (
        "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 39)\nprint('SUCCESS')",
        {"failed", "time"},
    ),
    "the gate of 32-bit programs": (
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\n"
        "m.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n"  # mov eax, getpid; int 0x80; ret
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(a)()\nprint('SUCCESS')",
        {"failed"},
    ),
    "raising its own limits": (
        "import resource as r\n"
        "for l in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC, r.RLIMIT_FSIZE):\n"
        "  try: r.setrlimit(l, (r.RLIM_INFINITY,) * 2); print('SUCCESS')\n"
        "  except (OSError, ValueError): pass",
        {"finished"},
    ),
    "real-time priority": (
        "import os\n"
        "try: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50)); print('SUCCESS')\n"
        "except OSError: pass\ntry: os.nice(-5); print('SUCCESS')\nexcept OSError: pass",
        {"finished"},
    ),
    "memory that no limit counts": (
        "import ctypes\nc = ctypes.CDLL(None).syscall\n"
        "for n, a in ((29, (0, 4096, 0o1600)), (64, (0, 1, 0o1600)), (68, (0, 0o1600)),\n"
        "  (319, (b'x', 0)), (447, (0,)), (323, (1,)), (253, ()), (294, (0,)), (250, (0, -3, 0)),\n"
        "  (240, (b'x', 0o102, 0o600, None)), (206, (8, ctypes.byref(ctypes.c_long(0)))),\n"
        "  (216, (0, 0, 0, 0, 0))):\n"
        "  if c(n, *a) >= 0: print('SUCCESS', n)",
        {"finished"},
    ),
    "open files left in a socket": (
        "import os, socket\na, b = socket.socketpair()\nf = os.open('f', os.O_CREAT)\n"
        "try: socket.send_fds(a, [b'x'], [f]); print('SUCCESS')\nexcept PermissionError: pass",
        {"finished"},
    ),
    "data for a socket that nobody accepts, or in datagrams": (
        "import socket\nfor call in (lambda: socket.socket(socket.AF_UNIX),\n"
        "  lambda: socket.socketpair(type=socket.SOCK_DGRAM),\n"
        "  lambda: socket.socketpair(type=socket.SOCK_SEQPACKET)):\n"
        "  try: call(); print('SUCCESS')\n  except PermissionError: pass\n"
        "a, b = socket.socketpair()\na.send(b'x')\n"
        "try: a.listen(); print('SUCCESS')\nexcept PermissionError: pass",
        {"finished"},
    ),
    "a large table in the kernel": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "if c.prctl(78, 1, 1 << 20, 0, 0) == 0 or ctypes.get_errno() != 1: print('SUCCESS')",
        {"finished"},
    ),
    "memory left in a pipe": (
        "import ctypes, mmap, os\nr, w = os.pipe()\nm = mmap.mmap(-1, 1 << 21)\nm[0] = 1\n"
        "v = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(m)), 4096)\n"
        "if ctypes.CDLL(None).syscall(278, w, v, 1, 0) >= 0: print('SUCCESS')",
        {"finished"},
    ),
    "sockets of other kinds, in pairs": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\nfor f in (2, 10, 16, 30, 38, 40):\n"
        "  c.syscall(53, f, 1, 0, (ctypes.c_int * 2)())\n"
        "  if ctypes.get_errno() != 13: print('SUCCESS')",  # EACCES: not even asked of the kernel
        {"finished"},
    ),
    "signals to process 1": (
        "import os, time\nfor s in range(1, 65):\n"
        "  try: os.kill(1, s)\n  except OSError: pass\n"
        "time.sleep(0.3)\nif os.getppid() != 1: print('SUCCESS')",
        {"finished"},
    ),
    "limits of process 1": (
        "import resource as r\nfor l in range(16):\n"
        "  try: r.prlimit(1, l, (0, 0)); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "shared memory of the host": (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "for i in range(200):\n"
        "  if c.shmat(i, None, 0o10000) not in (-1, None): print('SUCCESS')",
        {"finished"},
    ),
    "the terminal": (
        "try: open('/dev/tty'); print('SUCCESS')\nexcept OSError: pass\n"
        "try: open('/dev/kmsg'); print('SUCCESS')\nexcept OSError: pass",
        {"finished"},
    ),
    "changing its own input for the next test": (
        "import os\nfor call in (lambda: os.ftruncate(0, 0), lambda: os.write(0, b'x')):\n"
        "  try: call(); print('SUCCESS')\n  except OSError: pass",
        {"finished"},
    ),
    "the host's name": (
        "import os, socket\ntry: socket.sethostname('covey-attack'); print('SUCCESS')\n"
        "except OSError: pass",
        {"finished"},
    ),
}


@isolated
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_program_gets_nowhere_and_is_reported(name: str, host: dict[str, str]) -> None:
    source, endings = ATTACKS[name]
    for word, value in host.items():
        source = source.replace(word, value)
    before = time.monotonic()
    report = run(source, cpu_s=1 if "time" in endings else 15)
    assert b"SUCCESS" not in report.stdout, report
    assert report.ending in endings, report
    assert report.ending == "finished" or report.detail
    assert time.monotonic() - before < 60


def test_at_least_thirty_attacks_are_tried() -> None:
    assert len(ATTACKS) >= 30


@isolated
def test_a_program_has_its_input_its_scratch_folder_and_the_standard_library() -> None:
    source = (
        "import json, os, subprocess, tempfile\n"
        "with tempfile.NamedTemporaryFile('w+') as f:\n"
        "  f.write(input()); f.seek(0); text = f.read()\n"
        "child = subprocess.run(['/bin/echo', text], capture_output=True, text=True)\n"
        "print(json.dumps([child.stdout.strip(), os.getcwd()]))"
    )
    report = run(source, stdin=b"hello\n")
    assert (report.ending, report.stdout) == ("finished", b'["hello", "/tmp"]\n'), report


@isolated
def test_two_runs_share_nothing() -> None:
    assert run("open('left', 'w').write('x')").ending == "finished"
    assert run("open('left').read()").ending == "failed"


@isolated
def test_root_runs_programs_as_a_user_that_nobody_is() -> None:
    with Sandbox(CONFIG).started(
        Program(files={"main.py": "import time; time.sleep(60)"}, main="main.py"), cpu_s=60
    ) as running:
        running.wait_until_started()
        end, owners = time.monotonic() + 30, []
        while not owners and time.monotonic() < end:  # until the interpreter has replaced us
            owners = [
                Path(f"/proc/{pid}").stat().st_uid
                for pid in os.listdir("/proc")
                if pid.isdigit() and "/program/" in _command(pid)
            ]
        assert all(
            Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
            for pid in os.listdir("/proc")
            if pid.isdigit() and "/program/" in _command(pid)
        ), "when memory runs short, the kernel would not choose the sandbox first"
    assert owners
    expected = FIRST_SANDBOX_USER if os.getuid() == 0 else os.getuid()
    assert all(expected <= owner < expected + 1000 for owner in owners)
    assert sandboxed_processes() == []


@isolated
def test_a_sandbox_that_dies_under_a_program_is_the_programs_failure() -> None:
    program = Program(files={"main.py": "import time; time.sleep(60)"}, main="main.py")
    with Sandbox(CONFIG).started(program, cpu_s=60) as running:
        end, found = time.monotonic() + 30, []
        while not found and time.monotonic() < end:  # until the interpreter has replaced us
            found = [p for p in os.listdir("/proc") if p.isdigit() and "/program/" in _command(p)]
        status = Path(f"/proc/{found[0]}/status").read_text()
        process_1 = int(status.partition("PPid:")[2].split()[0])
        os.kill(process_1, signal.SIGKILL)  # as the kernel does where memory runs out
        report = running.report()
    assert report.ending == "failed", report
    assert report.detail


def _command(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_without_isolation_a_program_still_has_limits(tmp_path: Path) -> None:
    sandbox = Sandbox(CONFIG.model_copy(update={"isolation": "none"}))
    fine = sandbox.run(Program(files={"a.py": "print(6 * 7)"}, main="a.py"), cpu_s=2)
    assert (fine.ending, fine.stdout) == ("finished", b"42\n"), fine
    late = sandbox.run(Program(files={"a.py": "while True: pass"}, main="a.py"), cpu_s=1)
    assert late.ending == "time"
    hungry = sandbox.run(Program(files={"a.py": "x = bytearray(10**9)"}, main="a.py"), cpu_s=2)
    assert hungry.ending == "failed" and "MemoryError" in hungry.detail


ORPHANED = """
from reward_services.sandbox import Program, Sandbox
from reward_services.sandbox_config import SandboxConfig
program = Program(files={"main.py": "import time; time.sleep(600)"}, main="main.py")
with Sandbox(SandboxConfig()).started(program, cpu_s=600) as running:
    running.wait_until_started()
    print("running", flush=True)
    input()
"""


@isolated
def test_a_sandbox_ends_with_the_scorer_that_started_it() -> None:
    scorer = subprocess.Popen(
        [sys.executable, "-c", ORPHANED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert scorer.stdout is not None and scorer.stdin is not None
    assert scorer.stdout.readline() == b"running\n"
    scorer.kill()
    scorer.wait()
    scorer.stdout.close()
    scorer.stdin.close()
    end = time.monotonic() + 30
    while sandboxed_processes() and time.monotonic() < end:
        pass
    assert sandboxed_processes() == []
