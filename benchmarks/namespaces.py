"""A host of its own on this machine: namespaces, a TAP device as its network, private /dev/shm, /tmp/ray, /etc/hosts.

A host is the pid 1 of a process namespace; the other namespaces are its own, unnamed, so that killing it is a power
failure: the kernel ends every process in it, and with the last one its network and its mounts.

As a script it runs a command on a host:  python -I -S namespaces.py PID COMMAND [ARGUMENT ...]
Linux only (5.8 or later), root only, standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG, PR_SET_TIMERSLACK = 1, 29
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFHWADDR = 0x8914, 0x8916, 0x891C, 0x8924
IFF_UP, ARPHRD_ETHER = 1, 1
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4

DEVICE = "eth0"
NETMASK = "255.255.255.0"
RAY_DIRECTORY = "/tmp/ray"

_libc = ctypes.CDLL(None, use_errno=True)


def unavailable() -> str:
    """Why hosts can't be emulated here, in one line; empty where they can."""
    if sys.platform != "linux":
        return "emulated hosts need Linux: network namespaces and TAP devices"
    if os.geteuid() != 0:
        return "emulated hosts need root: they are network namespaces and TAP devices"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "emulated hosts need /dev/net/tun: load the kernel module `tun`"
    return ""


def fork_host(
    hostname: str, ip: str, mac: bytes, cores: Sequence[int], hosts_file: str, congestion_control: str
) -> tuple[int, socket.socket]:
    """Starts a host: its pid, and a socket over which it sends its TAP device once it is up, or else why it isn't.

    congestion_control is TCP's; this machine's own if empty.  The host ends with the process that called this, which
    has to be single-threaded.
    """
    ours, theirs = socket.socketpair()
    _check(_libc.unshare(CLONE_NEWPID))  # for the children: this process stays where it is
    pid = os.fork()
    if pid == 0:
        _be_host(theirs, hostname, ip, mac, cores, hosts_file, congestion_control)
    here = os.open("/proc/self/ns/pid", os.O_RDONLY)
    _check(_libc.setns(here, CLONE_NEWPID))
    os.close(here)
    theirs.close()
    return pid, ours


def receive_tap(from_host: socket.socket) -> int:
    """The descriptor of a started host's TAP device; raises OSError saying why the host didn't start."""
    message, descriptors, _, _ = socket.recv_fds(from_host, 4096, 1)
    if not descriptors:
        raise OSError(message.decode() or "the host ended while it started")
    return descriptors[0]


def set_segmentation(tap: int, by_host: bool) -> None:
    """Whether a TAP's host cuts its TCP streams into packets itself, or hands over up to 64 KB at once."""
    fcntl.ioctl(tap, TUNSETOFFLOAD, TUN_F_CSUM if by_host else TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)


def set_timer_slack(seconds: float) -> None:
    """How late the kernel may wake this thread, to wake it together with others; 50 µs unless set."""
    _libc.prctl(PR_SET_TIMERSLACK, int(seconds * 1e9), 0, 0, 0)


def _be_host(
    to_parent: socket.socket,
    hostname: str,
    ip: str,
    mac: bytes,
    cores: Sequence[int],
    hosts_file: str,
    congestion_control: str,
) -> NoReturn:
    """The host's pid 1: makes the host, and is there until it is killed."""
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.dup2(to_parent.fileno(), 3)
        os.closerange(4, 1 << 16)  # other hosts' TAP devices, the switch's sockets
        to_parent.detach()
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(s, signal.SIG_DFL)
        os.sched_setaffinity(0, cores)
        _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET))
        socket.sethostname(hostname)
        _mount_own(hosts_file)
        tap = _open_tap()
        _configure(ip, mac, congestion_control)
        with socket.socket(fileno=3) as parent:
            socket.send_fds(parent, [b"up"], [tap])
        os.close(tap)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever is left without a parent is reaped by the kernel
        while True:
            signal.pause()
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.write(3, f"{type(e).__name__}: {e}".encode())
    finally:
        os._exit(1)


def _mount_own(hosts_file: str) -> None:
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("proc", "/proc", "proc")
    _mount("tmpfs", "/dev/shm", "tmpfs", options="mode=1777")
    _mount("tmpfs", RAY_DIRECTORY, "tmpfs", options="mode=1777")
    _mount(hosts_file, "/etc/hosts", None, MS_BIND)


def _mount(source: str | None, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    text = [None if t is None else t.encode() for t in (source, target, kind, options)]
    _check(_libc.mount(text[0], text[1], text[2], ctypes.c_ulong(flags), text[3]), f"mounting {target}")


def _open_tap() -> int:
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    kind = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), kind))
    set_segmentation(tap, by_host=False)
    return tap


def _configure(ip: str, mac: bytes, congestion_control: str) -> None:
    settings = Path("/proc/sys/net")
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        (settings / f"ipv6/conf/{DEVICE}/disable_ipv6").write_text("1")
    (settings / "ipv4/tcp_no_metrics_save").write_text("1")  # what a link was like says nothing once it is changed
    if congestion_control:
        (settings / "ipv4/tcp_congestion_control").write_text(congestion_control)

    def set_address(request: int, address: str) -> None:
        packed = struct.pack("16sHH4s16x", DEVICE.encode(), socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(control, request, packed)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFHWADDR, struct.pack("16sH6s16x", DEVICE.encode(), ARPHRD_ETHER, mac))
        set_address(SIOCSIFADDR, ip)
        set_address(SIOCSIFNETMASK, NETMASK)
        for name in (DEVICE, "lo"):
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), IFF_UP))


def enter(pid: int, command: Sequence[str]) -> int:
    """Runs a command on the host with this pid, in this directory, and returns its exit status.

    The command ends with this process and gets its SIGTERM and SIGHUP; it comes as -SIGNAL if one killed it.
    """
    directory = os.getcwd()
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(pid))
        host = os.pidfd_open(pid)
    except ProcessLookupError:
        print("the host is down", file=sys.stderr)
        return 1
    _check(_libc.setns(host, CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWNET | CLONE_NEWPID))
    os.close(host)
    os.chdir(directory)  # joining the mounts has put us at their root
    child = os.fork()
    if child == 0:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            os.execvp(command[0], list(command))
        except OSError as e:
            print(f"{command[0]}: {e.strerror}", file=sys.stderr)
            os._exit(127)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command as well
    for s in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, lambda number, _: os.kill(child, number))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _check(result: int, what: str = "") -> None:
    """Raises OSError for a failed libc call."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}" if what else os.strerror(code))


def _main() -> None:
    status = enter(int(sys.argv[1]), sys.argv[2:])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    _main()
