"""What several test files share."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


# ------------------------------------------------------- the attack, beside the other tests

def pytest_collection_finish(session):
    """robust.py takes the second core while the other tests run; test_robust.py waits for it."""
    asked = any(item.path.name == "test_robust.py" for item in session.items)
    if asked and not session.config.option.collectonly:
        command = [sys.executable, ROOT / "tests" / "robust.py"]
        session.config.attack = subprocess.Popen(command, stdout=subprocess.PIPE,
                                                 stderr=subprocess.PIPE, text=True)

def pytest_unconfigure(config):
    attack = getattr(config, "attack", None)
    if attack and attack.poll() is None:
        attack.kill()


# ------------------------------------------------------------------------------------- fixtures

@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors here are so small that a second thread only costs."""
    torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """A float64 model whose weights matter everywhere: a fresh one's output projections are 0."""
    from data import text
    from model import Config, Model
    torch.manual_seed(0)
    model = Model(Config(text.VOCAB, layers=3, heads=2, width=16)).double()
    for block in model.blocks:
        torch.nn.init.normal_(block.out.weight, std=0.2)
        torch.nn.init.normal_(block.down.weight, std=0.2)
    return model


@pytest.fixture
def exits(capsys):
    """exits(words, f, *args): f(*args) ends with exit code 2 and one line on stderr that has the
    words."""
    def call(words, f, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            f(*args)
        err = capsys.readouterr().err
        assert e.value.code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        for word in words:
            assert word in err
    return call


@pytest.fixture
def refused(exits, monkeypatch, tmp_path):
    """refused(module, args, words): a script's command line, in this process and in the test's
    folder, ends with exit code 2 and one line that has the words, before anything is trained."""
    from lab.run import Run, command

    def began(run):
        pytest.fail("training began")

    def call(module, args, words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *args])
        monkeypatch.setattr(Run, "__iter__", began)
        exits(words, command, module.main)
    return call


@pytest.fixture
def start(tmp_path):
    """start(script, *args): a script of the project in a process of its own. What still runs when
    the test ends is killed."""
    processes = []

    def call(script, *args, **kw):
        command = [sys.executable, ROOT / script, *args]
        p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, **kw)
        processes.append(p)
        return p

    yield call
    for p in processes:
        with p:
            p.kill()
