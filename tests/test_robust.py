"""The short form of robust.py: hostile command lines, kills, full disks, broken files."""
import subprocess
import sys
from pathlib import Path


def test_nothing_is_lost_executed_or_silent():
    command = [sys.executable, Path(__file__).parent / "robust.py"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "lost: nothing" in ended.stdout
