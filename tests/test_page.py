"""The results page says what the JSON beside it says, and the README links to what is there; a
figure knows its model and its own settings."""
import importlib
import json
import os
import re

import torch
from matplotlib import rcParams

import train
from experiments import Analyze, Runs, figure, page, redraw
from lab.run import ROOT, checksum, write


def test_the_results_page_is_what_its_generator_makes_of_the_json():
    assert (ROOT / "assets/README.md").read_text() == page.page(ROOT / "assets")

def test_figures_have_settings_of_their_own(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://a_notebooks")
    rcParams.update({"text.usetex": True, "savefig.dpi": 7})
    importlib.reload(figure)
    found = rcParams["text.usetex"], rcParams["savefig.dpi"], os.environ.get("MPLBACKEND")
    assert found == (False, 150, None)

def test_every_link_of_the_readme_leads_somewhere():
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "assets/README.md").read_text()
    for name in re.findall(r"assets/README\.md#([\w-]+)", readme):
        assert f"\n## {name}\n" in results
    for path in re.findall(r"\(((?:assets|experiments)/[\w./-]+)\)", readme):
        assert (ROOT / path).exists()

def test_damaged_results_are_left_out_and_it_is_said(tmp_path, capsys):
    good = page.read(ROOT / "assets" / "patch.json")
    for name, change in (("patch", {}), ("nan", {"gaps": [{"x": [float("nan")] * 3}]}),
                         ("null", {"config": None})):
        write(tmp_path / "figures" / f"{name}.json", json.dumps(good | change))
    redraw(Analyze(out=str(tmp_path)))
    out, err = capsys.readouterr()
    assert re.findall(r"(\w+).json is left out", err) == ["nan", "null"] and "NaN" in err
    assert re.findall(r"(\w+).png", out) == ["patch"]

def test_a_checksum_is_of_what_was_loaded(base, tmp_path, monkeypatch):
    """Beside a training that writes its next checkpoint meanwhile."""
    path, real = tmp_path / "ckpt.pt", train.load_model
    path.write_bytes((base / "ckpt.pt").read_bytes())

    def load_model(*args):
        found = real(*args)
        path.write_bytes(b"the next one")
        return found
    monkeypatch.setattr(train, "load_model", load_model)
    runs = Runs(Analyze(sft=str(tmp_path)), torch.device("cpu"))
    assert runs.checkpoints == {} and checksum(runs.sft()) == runs.checkpoints[str(tmp_path)]
