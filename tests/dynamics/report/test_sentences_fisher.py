import copy

import pytest

from dynamics.report.sentences import informative_directions
from dynamics.report.summary import fisher_summary
from dynamics.text import number, percent
from tests.fishers import MEANS, with_fisher
from tests.trees import example_tree


@pytest.fixture(scope="module")
def fisher():
    return fisher_summary(with_fisher(example_tree(3, 2)))


@pytest.fixture(scope="module")
def leading():
    return fisher_summary(with_fisher(example_tree(3, 2), update="leading"))


def said(fisher, **changes):
    """All paragraphs, after changes to the row at k and to the rest of the concentration."""
    fisher = copy.deepcopy(fisher)
    for name, value in changes.items():
        part = fisher["concentration"]
        (part if name in part else part["at_k"])[name] = value
    return " ".join(informative_directions({"fisher": fisher}))


def interval(low, high, value=None):
    return {"value": (low + high) / 2 if value is None else value, "low": low, "high": high}


def test_the_spectrum_has_its_intervals_and_says_when_it_was_taken(fisher):
    entropy, ratio, participation, directional = (
        [number(fisher[name][end]) for end in ("value", "low", "high")]
        for name in ("spectral_entropy", "dominant_ratio", "participation_ratio", "participation_ratio_directional")
    )
    assert informative_directions({"fisher": fisher})[0] == (
        "The empirical Fisher was measured at step 300 with 40 probe samples in 40 groups, in tangent space (gradients "
        f"at the weights of step 299, before the update). The spectral entropy SE is {entropy[0]} nat at N = 40 "
        f"(plug-in, sampling error {entropy[1]} to {entropy[2]}); the Fisher's own SE is larger by an unknown amount. "
        f"It is at least {number(fisher['spectral_entropy']['lower_bound'])} nat, the low end of ln PR. The dominant "
        f"ratio ρ is between {ratio[1]} and {ratio[2]} (95 % interval) and the participation ratio is "
        f"{participation[0]} (95 % interval {participation[1]} to {participation[2]}). With all gradients scaled to "
        f"the same length the participation ratio is {directional[0]} (95 % interval {directional[1]} to "
        f"{directional[2]}). By their share of the trace, the groups count as {number(fisher['effective_groups'])} of "
        "equal size."
    )


@pytest.mark.parametrize(("bound", "is_told"), [(0.01, True), (0.0, False), (-4.9, False), (None, False)])
def test_a_bound_that_holds_of_every_entropy_is_not_told(fisher, bound, is_told):
    fisher = copy.deepcopy(fisher)
    fisher["spectral_entropy"]["lower_bound"] = bound
    assert ("It is at least" in informative_directions({"fisher": fisher})[0]) == is_told


def test_the_update_stands_beside_both_nulls(fisher):
    row = fisher["concentration"]["at_k"]
    _, beside_random, beside_gradient, _ = informative_directions({"fisher": fisher})
    isotropic, gradient = row["null_isotropic"], row["null_gradient"]
    assert (
        f"The 16 leading directions of the Fisher hold {percent(row['captured'])} of the squared norm of the update to "
        f"step 300 and {percent(isotropic['value'])} (95 % interval {percent(isotropic['low'])} to "
        f"{percent(isotropic['high'])}) of a random direction."
    ) in beside_random
    assert "; a random direction has 1. These gradients cannot reach 4.0 % of the update, which is left out." in (
        beside_random
    )
    assert (
        f"{percent(gradient['value'])} (95 % interval {percent(gradient['low'])} to {percent(gradient['high'])}) of a "
        f"fresh gradient of 2 samples: about as much (gain "
        f"{number(row['gain']['value'])}, 95 % interval {number(row['gain']['low'])} to "
        f"{number(row['gain']['high'])}; centred "
    ) in beside_gradient


def test_concentrated_is_said_where_the_flag_says_so(leading):
    assert leading["concentration"]["at_k"]["concentrated"]
    words = said(leading)
    assert (
        "The update is concentrated along informative directions, more than a gradient of its batch. The same holds at "
        "3 of 3 steps (chance: up to 1)." in words
    )
    assert (
        "The updates of 2 of 2 blocks are concentrated. Chance makes about 2.5 % so, all at once or none, since blocks "
        "share samples and draws." in words
    )


@pytest.mark.parametrize(("steps", "chance"), [(30, 2), (12, 1), (2, 1)])
def test_a_step_as_rare_as_chance_makes_it_is_not_called_concentrated(leading, steps, chance):
    words = said(leading, steps={"concentrated": 1, "of": steps}, blocks={"concentrated": 0, "of": 2})
    assert f"at 1 of {steps} steps, no more often than by chance (chance: up to {chance})." in words
    assert "update is concentrated" not in words


def test_more_samples_than_the_null_can_stand_for_are_said(leading):
    words = said(leading, concentrated=False, null_batch=400, null_batch_limit=160.0)
    assert "cannot be decided: the null can imitate at most 160 samples, eight times half of those probed." in words


@pytest.mark.parametrize(
    "gain", [interval(1.5, 3.0), interval(0.9, 1.2), interval(0.2, 0.5), {"value": 1.5, "low": None, "high": None}]
)
def test_concentrated_is_said_nowhere_else(leading, gain):
    blocks = {"concentrated": 2, "of": 40}  # as many as chance would give
    words = said(leading, concentrated=False, gain=gain, gain_centred=gain, blocks=blocks)
    assert "concentrated" not in words


def test_a_gain_that_proves_nothing_is_said_to_prove_nothing(leading):
    words = said(leading, concentrated=False)
    assert "The update is not shown to follow informative directions more than a gradient of its batch." in words


def test_less_than_a_gradient_is_said_too(fisher):
    words = said(fisher, gain=interval(0.2, 0.5))
    assert (
        "The update follows informative directions less than a plain gradient step would; Adam's scaling and momentum "
        "alone can cause this."
    ) in words


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (0.036, "of 2 samples: 28 times less (gain 0.0360, 95 %"),
        (2.5, "of 2 samples: 2.5 times as much (gain 2.50, 95 %"),
    ],
)
def test_a_gain_is_said_in_words(fisher, gain, words):
    assert words in said(fisher, gain=interval(0.9 * gain, 1.1 * gain, gain))


def test_one_step_is_not_counted(leading):
    assert "gradient of its batch. The updates of" in said(leading, steps={"concentrated": 1, "of": 1})


def test_without_a_gradient_null_nothing_is_claimed():
    words = said(fisher_summary(with_fisher(example_tree([7], 2), steps=(7,), batch_size=0, update="leading")))
    assert "There is no gradient null (see the findings), and any gradient exceeds a random direction." in words
    assert "concentrated" not in words
    assert "gain" not in words


def test_without_an_update_nothing_is_said_of_it():
    paragraphs = informative_directions({"fisher": fisher_summary(with_fisher(example_tree(3, 2), update="none"))})
    assert paragraphs[1] == "No update is known for these gradients, so its directions cannot be compared."
    assert len(paragraphs) == 3


def test_without_a_fisher_there_are_no_words():
    assert informative_directions({"fisher": None}) == []


def test_a_fisher_without_a_spectrum_refers_to_the_findings(fisher):
    broken = {**fisher, "spectral_entropy": {"value": None, "low": None, "high": None, "lower_bound": None}}
    assert informative_directions({"fisher": broken})[0].endswith("It has no spectrum: see the findings.")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fisher": "sampled"}, "The Fisher with sampled labels was measured at step 300 with 40 probe samples"),
        ({"evaluated_at_step": 300}, "in tangent space (gradients at the weights of that step)."),
        ({"evaluated_at_step": None}, "in tangent space (gradients at the weights of that step)."),
        (
            {"dominant_ratio": {"value": 0.5, "low": None, "high": None}},
            "The dominant ratio ρ is 0.500 (plug-in, too large in expectation)",
        ),
        (
            {"spectral_entropy": {"value": 2.0, "low": None, "high": None, "lower_bound": None}},
            "SE is 2.00 nat at N = 40 (plug-in); the Fisher's own SE is larger by an unknown amount. The",
        ),
    ],
)
def test_what_differs_is_said(fisher, changes, words):
    assert words in informative_directions({"fisher": {**fisher, **changes}})[0]


def test_every_pair_of_tasks_has_its_sentence(fisher):
    told = informative_directions({"fisher": fisher})[-1]
    for pair in fisher["pairs"][:4]:
        assert pair["sentence"] in told
    assert "Intervals of cosines hold with 95 % for all pairs together." in told


def test_of_many_pairs_those_that_are_resolved_come_first(fisher):
    unresolved = [{**fisher["pairs"][2], "sentence": f"Pair {number}."} for number in range(9)]
    told = informative_directions({"fisher": {**fisher, "pairs": [*unresolved, fisher["pairs"][0]]}})[-1]
    assert told.startswith(f"{fisher['pairs'][0]['sentence']} Pair 0. Pair 1. Pair 2. Pair 3. 5 more pairs in summary")


def test_the_sharing_term_has_its_band(fisher):
    words = said(fisher)
    parts = fisher["mixture"]
    assert (
        f"different directions: with equal traces χ = {number(parts['normalised_divergence'])} of at most "
        f"{number(parts['normalised_largest'])} nat (with shuffled task labels {number(parts['null_low'])} to "
        f"{number(parts['null_high'])}; p = 0.010)."
    ) in words


@pytest.mark.parametrize(
    ("divergence", "p", "verdict"),
    [
        (0.56, 0.01, "The tasks use largely different directions: with equal traces χ = 0.560 of at most 0.690 nat"),
        (0.2, 0.01, "The tasks use partly different directions: with equal traces χ = 0.200"),
        (0.56, 0.3, "The tasks are not shown to use different directions: with equal traces χ = 0.560"),
    ],
)
def test_how_different_tasks_are_depends_on_the_test(fisher, divergence, p, verdict):
    parts = {"normalised_divergence": divergence, "normalised_largest": 0.69, "p_value": p}
    changed = {**fisher, "mixture": {**fisher["mixture"], **parts}}
    assert verdict in informative_directions({"fisher": changed})[-1]


def test_the_sharing_term_without_a_test_is_a_number(fisher):
    parts = fisher["mixture"]
    changed = {**fisher, "mixture": {**parts, "null_low": None}}
    assert (
        f"Of the spectral entropy, {number(parts['within_tasks'])} nat lie within tasks and χ = "
        f"{number(parts['divergence'])} of at most {number(parts['largest_divergence'])} nat between them."
    ) in informative_directions({"fisher": changed})[-1]


def test_a_single_task_has_no_paragraph_of_tasks():
    alone = with_fisher(example_tree([7], 2), steps=(7,), means={"a": MEANS["chart"]})
    paragraphs = informative_directions({"fisher": fisher_summary(alone)})
    assert len(paragraphs) == 3
    assert not any("tasks" in paragraph for paragraph in paragraphs)


@pytest.mark.parametrize(
    ("update", "words"),
    [
        ("leading", "The update follows informative directions more than the optimizer's scaling explains."),
        ("random", "The update follows informative directions less than a fresh gradient does under this optimizer."),
        ("step", "The update is not shown to differ from a fresh gradient under this optimizer."),
    ],
)
def test_an_update_is_compared_with_steps_of_its_optimizer(update, words):
    told = fisher_summary(with_fisher(example_tree(3, 2), update=update, optimizer=True))
    row = told["concentration"]["at_k"]
    paragraph = informative_directions({"fisher": told})[3]
    assert paragraph.startswith(
        f"Passed through the optimizer, a fresh gradient has {percent(row['null_optimizer']['value'])} (95 % interval "
    )
    assert f"(gain {number(row['gain_optimizer']['value'])}, 95 %" in paragraph
    assert paragraph.endswith(words)


@pytest.mark.parametrize(
    ("gain", "concentrated", "words"),
    [
        (interval(0.2, 0.5), False, "The optimizer's scaling may explain the difference from a plain gradient."),
        (interval(1.2, 1.5), True, "The optimizer's scaling may explain the concentration."),
    ],
)
def test_what_the_optimizer_may_explain(leading, gain, concentrated, words):
    beside = {"gain_optimizer": interval(0.8, 1.3), "gain_optimizer_centred": interval(0.8, 1.3)}
    told = said(leading, gain=gain, concentrated=concentrated, null_optimizer=interval(0.1, 0.3), **beside)
    assert words in told
    assert "momentum alone can cause this" not in told


def test_plain_sgd_has_one_null(leading):
    row = leading["concentration"]["at_k"]
    told = said(leading, gain_optimizer=row["gain"])
    assert "The optimizer steps along the gradient itself, so that fresh steps of it are no other null." in told
    assert "Passed through" not in told
