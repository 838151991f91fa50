"""The results page says what the JSON beside it says, and the README links to what is there."""
import re

from experiments import page
from lab.run import ROOT


def test_the_results_page_is_what_its_generator_makes_of_the_json():
    assert (ROOT / "assets/README.md").read_text() == page.page(ROOT / "assets")

def test_every_link_of_the_readme_leads_somewhere():
    readme, results = (ROOT / "README.md").read_text(), (ROOT / "assets/README.md").read_text()
    for name in re.findall(r"assets/README\.md#([\w-]+)", readme):
        assert f"\n## {name}\n" in results
    for path in re.findall(r"\(((?:assets|experiments)/[\w./-]+)\)", readme):
        assert (ROOT / path).exists()
