"""The short form of robust.py: kills, broken files, full disks, hostile command lines."""
import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_executed_or_silent():
    r = subprocess.run([sys.executable, Path(__file__).parent / "robust.py"], capture_output=True, text=True)
    assert r.returncode == 0 and "lost: nothing" in r.stdout, r.stdout + r.stderr
