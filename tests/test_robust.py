"""The short form of robust.py: hostile command lines, kills, full disks, broken files."""


def test_nothing_is_lost_executed_or_silent(request):
    attack = request.config.attack                  # conftest.py has started it
    out, err = attack.communicate()
    assert attack.returncode == 0, out + err
    assert "lost: nothing" in out
