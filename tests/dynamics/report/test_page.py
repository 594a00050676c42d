import json
import re
from base64 import b64encode
from collections import Counter
from hashlib import sha256
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from dynamics.findings import Finding
from dynamics.report import summarise
from dynamics.report.page import page
from tests.fishers import MEANS, with_fisher
from tests.trees import HOSTILE, example_runs, example_tree, matrix_names

REPOSITORY = Path(__file__).parents[3]


class Page(HTMLParser):
    """Elements, identifiers and text of a page."""

    VOID = ("meta", "br", "wbr", "rect", "path", "use", "image", "line", "circle")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th", "dt", "dd", "p", "h1", "h2", "h3", "li"):
            self.text.append(" ")

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self):
        return " ".join("".join(self.text).split())


def sections(parsed):
    """The sections of a page: identifier without and with its prefix."""
    identifiers = [attributes["id"] for attributes in parsed.all("section") if "id" in attributes]
    return [(identifier, identifier.partition("-")[2]) for identifier in identifiers]


@pytest.fixture(scope="module")
def text():
    findings = [
        Finding("OD101", f"Number {n}.", "Copy it again.", file=f"c-{n}", evidence={"bytes": n}) for n in range(5)
    ]
    return page(example_tree(matrices=21, run="imax", findings=[*findings, Finding("OD204", "First.")]))


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


@pytest.fixture(scope="module")
def captured():
    return page(example_tree(matrices=7, steps=3, gradients=[100, 200]))


def test_needs_nothing_but_itself(text, parsed):
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:")), (tag, target)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not parsed.all("link")


def test_allows_no_script_but_its_own(text, parsed):
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    policy = next(
        meta["content"] for meta in parsed.all("meta") if "content" in meta and "default-src" in meta["content"]
    )
    assert f"script-src 'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not [a for _, a in parsed.elements if any(name.startswith("on") for name in a)]


def test_says_first_what_was_analysed(parsed):
    words = parsed.words()
    assert "imax 6 checkpoints (steps 100 to 600); 21 weight matrices with LoRA updates of rank 8." in words
    assert words.index("6 checkpoints") < words.index("Answers") < words.index("How far did the weights move?")


def test_sections_stand_in_the_order_of_their_worth(parsed):
    words = parsed.words()
    headings = [
        "Did it train, everywhere?",
        "Findings: 5 errors, 1 note",
        "The update in numbers",
        "How far did the weights move?",
        "How many directions did the updates use?",
        "Where and when?",
        "Which matrices stand out?",
        "Every matrix at step 600",
        "What the numbers mean",
        "Provenance",
    ]
    places = [words.rindex(heading) for heading in headings]
    assert places == sorted(places)


def test_findings_have_evidence_and_remedy_and_fold_when_many(text, parsed):
    words = parsed.words()
    title = Finding("OD101", "").title
    assert f"{title[0].upper()}{title[1:]} OD101" in words
    assert "c-1: Number 1. Evidence: bytes 1." in words
    assert words.count("What to do: Copy it again.") == 1
    assert "2 more" in words
    start = text.index("<summary>2 more</summary>")
    folded = text[start : text.index("</details>", start)]
    assert "Number 3." in folded
    assert "Number 2." not in folded


def test_every_figure_has_words_for_who_cannot_see_it(parsed):
    pictures = [svg for svg in parsed.all("svg") if svg.get("role") == "img"]
    assert len(pictures) == len(parsed.all("svg")) - 7  # the bars of the seven roles repeat the number beside them
    assert all(len(svg["aria-label"]) > 20 for svg in pictures)


def test_identifiers_are_unique(parsed):
    counts = Counter(attributes["id"] for _, attributes in parsed.elements if "id" in attributes)
    assert [name for name, count in counts.items() if count > 1] == []


def test_table_has_a_row_for_each_matrix_and_reads_without_scripts(text):
    table = text[text.index('<table class="numbers sortable">') :]
    table = table[: table.index("</table>")]
    assert table.count('<th scope="row"') == 21
    assert table.count('<th scope="col">') == 11
    assert "<button" not in table
    assert "hidden>Click a heading to sort." in table


def test_cells_of_the_heatmaps_tell_their_values(text):
    assert text.count("<title>model.layers.2.mlp.down_proj, step 600: ") == 2


def test_measures_are_defined_with_their_reference(parsed):
    words = parsed.words()
    assert (
        "effective_rank_amplitude effective rank (amplitude) exp(−Σ p ln p) with p = σ/Σσ Roy & Vetterli 2007" in words
    )
    assert "stable_rank stable rank Σσ²/σ₁² Rudelson & Vershynin 2007" in words


def test_says_where_it_comes_from(parsed):
    words = parsed.words()
    for each in (
        "2026-01-02T03:04:05+00:00",
        "optimization-dynamics 1.2.3",
        "torch 2.13.0",
        '"device": "cpu"',
        "a" * 64,
    ):
        assert each in words


def test_gradients_have_a_section_between_directions_and_places(captured):
    words = Page(captured).words()
    headings = ["How many directions did the updates use?", "What did the gradients look like?", "Where and when?"]
    places = [words.index(heading) for heading in headings]
    assert places == sorted(places)
    section = captured[captured.index(headings[1]) : captured.index(headings[2])]
    assert section.count("<figure>") == 3
    assert "s(∇<sub>B</sub>·A + B·∇<sub>A</sub>)" in section
    assert "Only norms were recorded" not in section
    assert "Recorded at 3 steps, without checkpoints (steps 100 to 300)" in words
    assert "At step 200 the median gradient norm of a matrix is" in words


def test_numbers_of_gradients_are_defined(captured, parsed):
    defined = "gradient/norm_after_clip gradient norm after clipping the same as the optimizer takes it, after clipping"
    assert f"{defined} loss/weight" in Page(captured).words()
    assert "gradient/" not in parsed.words()


def test_norms_alone_are_said_to_be_that():
    text = page(example_tree(steps=2, matrices=2, gradients=[100, 200], gradient_spectra=False), figures={})
    assert "Only norms were recorded; the preset “standard” records spectra as well." in Page(text).words()
    assert "gradient norm of a matrix" in Page(text).words()
    assert "effective rank (energy) of the gradients" not in Page(text).words().lower()


def test_gradients_that_were_gone_are_said_to_be_that():
    tree = example_tree(steps=2, matrices=2, gradients=[100, 200], gradient_spectra=False)
    for name in ("norm_before_clip", "norm_after_clip"):
        tree["gradient"][name][:] = np.nan
    words = Page(page(tree, figures={})).words()
    assert "No gradient could be measured: see the findings." in words
    assert "Only norms were recorded" not in words


def test_a_run_without_gradients_has_no_section_of_them(parsed):
    assert "what did the gradients look like?" not in parsed.words().lower()
    assert "gradient of" not in parsed.words().lower()


def test_increments_of_a_capture_are_since_captured_steps(captured, parsed):
    assert "change since the previous recorded step or checkpoint of the same training" in Page(captured).words()
    assert "change since the previous checkpoint of the same training" in parsed.words()


@pytest.fixture(scope="module")
def probed():
    return page(with_fisher(example_tree(matrices=7, steps=3, gradients=[100]), update="leading"))


def test_informative_directions_have_a_section_between_gradients_and_places(probed):
    words = Page(probed).words()
    headings = ["What did the gradients look like?", "Did updates follow informative directions?", "Where and when?"]
    places = [words.index(heading) for heading in headings]
    assert places == sorted(places)
    section = probed[probed.index(headings[1]) : probed.index(headings[2])]
    assert section.count("<figure>") == 10  # all but transfer, which needs factor space
    assert "The empirical Fisher was measured at step 300 with 40 probe samples in 40 groups" in section
    assert "The update is concentrated along informative directions" in section


def test_numbers_of_the_fisher_are_defined(probed, parsed):
    words = Page(probed).words()
    assert (
        "fisher/spectral_entropy spectral entropy SE −Σ p ln p, p = λ/Σλ, plug-in: too small in expectation nat"
        in words
    )
    assert "concentration/null_isotropic the same share of a random direction k/d" in words
    assert "tr F<sub>s</sub>F<sub>t</sub>/√(tr F<sub>s</sub>² tr F<sub>t</sub>²)" in probed
    for prefix in ("fisher/", "concentration/", "tasks/"):
        assert prefix not in parsed.words()


def test_a_run_without_a_fisher_has_no_section_of_it(parsed):
    assert "informative" not in [identifier for _, identifier in sections(parsed)]
    assert "eigenvectors" not in parsed.words()


def test_an_update_that_proves_nothing_is_not_called_concentrated():
    tree = with_fisher(example_tree(matrices=2, steps=1), steps=(100,), update="random")
    text = page(tree, figures={})
    section = text[text.index("Did updates follow") : text.index("Where and when?")]
    assert "The update follows informative directions less than" in section
    assert "concentrated" not in section


def test_names_of_tasks_are_escaped():
    means = {HOSTILE: MEANS["chart"], "b": MEANS["document"]}
    text = page(with_fisher(example_tree(matrices=2, steps=1), steps=(100,), means=means))
    assert "<script>alert" not in text
    assert text.count("<script") == 1
    assert HOSTILE in Page(text).words()


def test_text_of_files_is_escaped():
    findings = [Finding("OD115", HOSTILE, HOSTILE, file=HOSTILE, matrix=HOSTILE, evidence={HOSTILE: [HOSTILE]})]
    names = [HOSTILE, f"{HOSTILE}.0.q", f"{HOSTILE}.1.q"]
    text = page(example_tree(matrices=names, run=HOSTILE, findings=findings))
    assert "<script>alert" not in text
    assert text.count("<script") == 1
    assert HOSTILE in Page(text).words()


@pytest.mark.parametrize(
    ("awkward", "said"),
    [
        ({"steps": 1}, "No training has two checkpoints, so there are no increments."),
        ({"steps": 1, "gradients": [100]}, "No training has two steps, so there are no increments."),
        ({"matrices": 1}, "1 weight matrix with LoRA updates"),
        ({"zero": matrix_names(14)}, "None: no update at step 600 is known to differ from zero."),
        ({"zero": matrix_names(14)}, "Not defined at step 600"),
        ({"segment": [0, 1, 0, 1, 0, 1]}, "of 2 different trainings"),
        ({"missing": matrix_names(14)}, "At step 600 the size of the whole update is not known."),
        ({"missing": matrix_names(2)}, "not in last checkpoint"),
    ],
)
def test_awkward_results_have_a_page(awkward, said):
    text = page(example_tree(**awkward), figures={})
    assert said in Page(text).words()
    assert not re.search(r">\s*(nan|None|inf)\s*<", text)


def test_seven_billion_parameters_fit_in_three_megabytes():
    text = page(example_tree(steps=20, matrices=224))
    assert len(text.encode()) < 3_000_000


def test_very_many_matrices_are_told_in_part(monkeypatch):
    monkeypatch.setattr(import_module("dynamics.report.page"), "MOST_ROWS", 10)
    words = Page(page(example_tree(steps=1), figures={})).words()
    assert "The 10 largest of 14 updates; all are in summary.json." in words


def test_too_many_cells_for_hover_are_a_picture(monkeypatch):
    monkeypatch.setattr(import_module("dynamics.plot.hover_heatmap"), "MOST_CELLS", 83)
    text = page(example_tree(), figures={"heatmap_frobenius_norm": "<svg><title>it</title></svg>"})
    assert "There are too many cells to show values on hover" in text
    assert "<svg><title>it</title></svg>" in text
    assert 'class="cells"' not in text


def test_several_runs_have_a_section_each_and_contents():
    parsed = Page(page(example_runs(a=example_tree(steps=1), b=example_tree(steps=2)), figures={}))
    articles = [article["id"] for article in parsed.all("article")]
    assert len(articles) == 2
    assert {f"#{article}" for article in articles} <= {link["href"] for link in parsed.all("a")}
    assert parsed.words().index("Findings: 1 error") < parsed.words().index("Runs Each run at its last step")
    assert len(parsed.all("h1")) == 1


def test_figures_that_are_drawn_already_are_used():
    text = page(example_tree(steps=1), figures={"frobenius_norm_total": "<svg><title>mine</title></svg>"})
    assert "<figure><svg><title>mine</title></svg>" in text


def test_a_summary_that_is_made_already_is_used(monkeypatch):
    tree = example_tree(steps=1)
    summary, expected = summarise(tree), page(tree, figures={})
    module = import_module("dynamics.report.page")
    monkeypatch.setattr(module, "summarise", lambda tree: pytest.fail("the summary was made again"))
    assert page(tree, figures={}, summary=summary) == expected


@pytest.mark.parametrize("name", ["pydoc_lora"])
def test_a_real_run(name):
    from dynamics.checkpoints import open_trajectory
    from dynamics.pipeline import measure

    run = REPOSITORY / "examples" / "runs" / name
    if not run.is_dir():
        pytest.skip(f"the sample run is not in this checkout (looked for examples/runs/{name})")
    parsed = Page(page(measure(open_trajectory(run))))
    assert f"{name} 8 checkpoints (steps 25 to 200); 20 weight matrices" in parsed.words()


def test_control_characters_are_written_out_wherever_they_come_from():
    sign = "x\x1b[31m\x07\u202e\x9b"
    tree = example_tree(run=f"imax{sign}", matrices=[f"layers.0.{sign}", "layers.1.q"])
    tree.attrs["findings"] = json.dumps([Finding("OD101", sign, sign, file=sign, matrix=sign).to_dict()])
    text = page(tree)
    assert not [character for character in text if not character.isprintable() and character not in "\n\t\xa0"]
    assert "x\\x1b[31m" in text
