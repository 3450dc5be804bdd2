"""Several hosts on one machine: a scheduler and two workers in network namespaces of their own, joined by a bridge."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason="the extra cluster is not installed")

# A separate network, mounts and processes; `--kill-child`: nothing of it is left, however this ends.
UNSHARE = ["unshare", "-rnm", "--pid", "--fork", "--kill-child", "--mount-proc"]

HOSTS = """
set -e
mount -t tmpfs none /run
mkdir -p /run/netns
ip link set lo up
ip link add hub type bridge
ip addr add 10.77.0.254/24 dev hub
ip link set hub up
for k in 1 2 3; do
    ip netns add "host$k"
    ip link add "cable$k" type veth peer name eth0 netns "host$k"
    ip link set "cable$k" master hub up
    ip -n "host$k" addr add "10.77.0.$k/24" dev eth0
    ip -n "host$k" link set eth0 up
    ip -n "host$k" link set lo up
done
"""

CUT = """
import functools, json, os, subprocess, sys, time
import dask
from distributed import Client
from calib_nb.core.cluster import cluster
from calib_nb.core.parallel import parallel_map

def slowly(x):
    time.sleep(0.02)
    return x * x

if __name__ == "__main__":
    settings = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "15s", "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "15s"}
    run = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "10.77.0.1", "--port", "8786"]
    processes = [subprocess.Popen(["ip", "netns", "exec", "host1", *run], env=os.environ | settings)]
    time.sleep(1)
    for k in (2, 3):
        run = [sys.executable, "-m", "distributed.cli.dask_worker", "tcp://10.77.0.1:8786", "--host", f"10.77.0.{k}",
               "--nthreads", "1", "--local-directory", os.path.join(sys.argv[1], f"host{k}")]
        processes.append(subprocess.Popen(["ip", "netns", "exec", f"host{k}", *run], env=os.environ | settings))
    try:
        limits = {"distributed.comm.timeouts.tcp": "15s"}
        with dask.config.set(limits), Client("tcp://10.77.0.1:8786", timeout="60s") as client:
            client.wait_for_workers(2, timeout=90)
            with cluster(client):
                results = parallel_map(slowly, range(1500), progress=False)
                values = [next(results) for _ in range(200)]
                workers = len(client.nthreads())
                subprocess.run(["ip", "link", "set", "cable3", "down"], check=True)
                start = time.monotonic()
                seconds = None
                for value in results:
                    values.append(value)
                    if seconds is None and len(values) % 20 == 0 and len(client.nthreads()) == 1:
                        seconds = time.monotonic() - start
                while seconds is None and time.monotonic() - start < 60:
                    time.sleep(0.2)
                    if len(client.nthreads()) == 1:
                        seconds = time.monotonic() - start
        equal = values == [x * x for x in range(1500)]
        print("RESULT " + json.dumps({"equal": equal, "workers": workers, "seconds": seconds}), flush=True)
    finally:
        for process in processes:
            process.kill()
"""


def hosts_reason() -> str:
    """Why there can be no network namespaces here; "" where there can."""
    if not shutil.which("unshare") or not shutil.which("ip"):
        return "the programs unshare and ip are not installed"
    tried = subprocess.run([*UNSHARE, "bash", "-c", HOSTS], capture_output=True, text=True)
    return " ".join(tried.stderr.split())[-200:] if tried.returncode else ""


@pytest.mark.slow
def test_a_worker_whose_link_is_cut_is_given_up_and_the_result_is_equal(tmp_path):
    if reason := hosts_reason():
        pytest.skip(f"no network namespaces here: {reason}")
    (tmp_path / "cut.py").write_text(CUT)
    root = Path(__file__).resolve().parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(tmp_path)])}
    command = f"{HOSTS}\nexec {sys.executable} {tmp_path / 'cut.py'} {tmp_path}"
    run = [*UNSHARE, "bash", "-c", command]
    with subprocess.Popen(run, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    assert lines, err[-3000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    print(f"given up after {result['seconds']:.1f} s")
    assert result["equal"] and result["workers"] == 2
    assert result["seconds"] is not None and result["seconds"] <= 30
