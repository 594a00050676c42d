"""The first screen of the page: answers with verdicts, pictures and links, findings to act on, folded notes."""

import re

import pytest

from dynamics.findings import Finding
from dynamics.relate.run_measures import relate_runs
from dynamics.relate.score_files import ScoreRow
from dynamics.report import summarise
from dynamics.report.answers.answer import QUESTIONS
from dynamics.report.page import GLOSSARY, contents, explained, inline, page
from tests.answers import VERDICTS, answered
from tests.dynamics.report.test_page import Page
from tests.fishers import with_fisher
from tests.trees import HOSTILE, example_runs, example_tree

NOTES = [Finding("OD204", "First."), Finding("OD202", "Zero.")]


@pytest.fixture(scope="module")
def text():
    tree = with_fisher(example_tree(matrices=7, steps=3, findings=[*NOTES, Finding("OD115", "Gone.", "Copy it.")]))
    return page(tree, figures={}, summary=answered(summarise(tree), {"trained": "All moved, −0.1 nat, 2 nat."}))


@pytest.fixture(scope="module")
def rows(text):
    """The part of the page of each question."""
    parts = re.split(r'<div class="answer (\w+)">', text.partition("<h2>Findings")[0])[1:]
    return dict(zip(QUESTIONS, zip(parts[::2], parts[1::2], strict=True), strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_has_a_row_with_its_verdict_in_words(rows, question):
    kind, part = rows[question]
    assert kind == VERDICTS[question]
    words = " ".join(re.sub("<[^>]+>", " ", part).split())
    mark = {"yes": "✓ Yes", "no": "✕ No", "mixed": "◐ Mixed", "undecided": "? Undecided", "not_asked": "– Not asked"}
    assert words.startswith(f"{QUESTIONS[question]} {mark[kind]}")


def test_the_mark_is_hidden_from_those_who_hear_the_word(rows):
    assert '<span aria-hidden="true">✓</span> Yes' in rows["trained"][1]


def test_remedies_and_confidence_are_small(rows):
    assert '<p class="small">Confidence 95 %. To be surer: probe more samples.</p>' in rows["concentration"][1]
    assert '<p class="small">To ask: pass --probe MODULE:FUNCTION.</p>' in rows["tasks"][1]


def test_evidence_is_one_click_away(text, rows):
    assert "<code>/update/frobenius_norm_all</code>: −2.50 (−3.00 to −2.00)" in rows["trained"][1]
    sections = {"trained": "where", "rank": "matrices", "stable": "moved", "concentration": "informative"}
    for question, section in sections.items():
        assert f'<a href="#run0-{section}">' in rows[question][1]
        assert f'id="run0-{section}"' in text
    assert "<a " not in rows["checkpoint"][1]  # without scores there is no section


def test_answers_have_pictures_with_words(rows):
    drawn = {question for question, (_, part) in rows.items() if "<svg" in part}
    assert drawn == {"trained", "rank", "tasks", "concentration", "stable"}
    assert all('role="img" aria-label="' in rows[question][1] for question in drawn)


def test_contents_lead_to_every_section(text):
    parsed = Page(text)
    links = re.search(r'<nav class="contents".*?</nav>', text)[0]
    targets = re.findall(r'href="#([^"]+)"', links)
    assert targets == [section["id"] for section in parsed.all("section")]
    assert targets[:2] == ["run0-answers", "run0-findings"]


def test_notes_are_folded_and_the_others_are_not(text):
    section = text[text.index('id="run0-findings"') : text.index('id="run0-numbers"')]
    before, folded = section.split("<details><summary>Notes on reading: OD202, OD204</summary>")
    assert "Findings: 1 warning, 2 notes" in before
    assert "What to do:</b> Copy it." in before
    assert "Zero." in folded
    assert "OD202" not in before


def test_findings_begin_with_a_capital_letter(text):
    assert re.search(r"</span> A matrix is missing from some checkpoints <code>OD115", text)


def test_a_word_is_explained_where_it_comes_first():
    assert explained("2 nat and 3 nat").count("<abbr") == 1
    assert explained("Energy of natural combinations") == (
        f'<abbr title="{GLOSSARY["energy"]}">Energy</abbr> of natural combinations'
    )
    assert explained("the participation ratio ρ").count("<abbr") == 2
    assert explained(HOSTILE).count("<") == 0


def test_words_in_answers_are_explained(rows):
    assert rows["trained"][1].count(f'<abbr title="{GLOSSARY["nat"]}">nat</abbr>') == 1


def test_no_hyphen_stands_for_a_minus_sign(text):
    words = re.sub(r"<(style|script|svg|code)\b.*?</\1>", " ", text, flags=re.DOTALL)
    assert not re.search(r"[\s>(]-\d", re.sub(r"<[^>]+>", " ", words))


def test_hostile_answers_and_names_are_escaped():
    tree = example_tree(matrices=[f"{HOSTILE}.0.q", f"{HOSTILE}.1.q"], steps=2)
    text = page(tree, figures={}, summary=answered(summarise(tree), dict.fromkeys(QUESTIONS, HOSTILE)))
    assert text.count("<script") == 1
    assert "<script>alert" not in text


def test_figures_in_a_page_leave_fonts_to_it():
    style = "font-size: 9px; font-family: 'A', sans-serif; fill: #333333"
    svg = f'<svg>\n  <g>\n   <text style="{style}">x</text></g></svg>'
    assert inline(svg) == '<svg>\n<g>\n<text style="font-size: 9px; fill: #333333">x</text></g></svg>'


def test_sections_without_a_title_for_contents_are_left_out():
    html = '<section id="a" data-contents="A"><section class="x" id="b" data-contents="B"><section id="c">'
    assert contents(html) == [("a", "A"), ("b", "B")]


def test_several_runs_have_answers_together_and_each():
    runs = example_runs(a=example_tree(steps=2), b=example_tree(steps=2))
    summary = answered(summarise(runs))
    summary["answers"][-1] |= {"verdict": "no", "answer": "Neither is better."}
    text = page(runs, figures={}, summary=summary)
    assert text.count('class="answers"') == 3
    first = text[: text.index("<article")]
    assert first.index("Neither is better.") < first.index("The answer to trained.")
    assert '<a href="#runs">' in first
    assert first.count("<nav") == 2


def test_one_run_has_a_sentence_in_place_of_correlations():
    tree = example_tree(steps=8, matrices=3)
    related = relate_runs({"a": tree}, [ScoreRow("a", 100 * step, "vqa", float(step % 3)) for step in range(1, 9)])
    tree["association"] = related.groups["association"]
    text = page(tree)
    section = text[text.index('<section id="related"') :]
    section = section[: section.index("</section>")]
    assert "One run cannot show which measures go with its scores: give several runs." in section
    assert "<svg" not in section
    assert "<table" not in section
    assert text.index('id="related"') < text.index('id="run0-numbers"')


def test_a_dark_scheme_and_wide_tables(text):
    assert "prefers-color-scheme: dark" in text
    assert text.count('class="scroll wide"') == text.count('class="scroll')
    assert 'role="region" aria-label="Table of roles"' in text
