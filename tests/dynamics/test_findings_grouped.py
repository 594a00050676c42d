from dynamics.findings import Finding, evidence_words, grouped, location


def as_dicts(*findings):
    return [finding.to_dict() for finding in findings]


def test_errors_come_first_and_a_code_once():
    groups = grouped(
        as_dicts(Finding("OD204", "a"), Finding("OD115", "b"), Finding("OD101", "c"), Finding("OD204", "d"))
    )
    assert [(group.severity, group.code) for group in groups] == [
        ("error", "OD101"), ("warning", "OD115"), ("note", "OD204"),
    ]  # fmt: skip
    assert [finding["message"] for finding in groups[-1].findings] == ["a", "d"]


def test_each_remedy_is_said_once():
    (group,) = grouped(as_dicts(*(Finding("OD101", str(n), "Copy it again.") for n in range(3)), Finding("OD101", "x")))
    assert group.remedies == ["Copy it again."]


def test_a_place_is_what_is_known_of_it():
    finding = Finding("OD101", "m", file="checkpoint-5/a.safetensors", matrix="h.0.q", step=5)
    assert location(finding.to_dict()) == "checkpoint-5/a.safetensors, h.0.q, step 5"
    assert location(Finding("OD117", "m").to_dict()) == ""
    assert location(Finding("OD202", "m", step=0).to_dict()) == "step 0"


def test_a_step_that_the_message_names_is_not_said_twice():
    assert location(Finding("OD205", "At step 20 it is small.", step=20).to_dict()) == ""
    assert location(Finding("OD205", "At step 200 it is small.", step=20).to_dict()) == "step 20"


def test_long_evidence_is_cut_and_says_so():
    assert evidence_words({"names": [str(n) for n in range(10)]}) == "names 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def test_evidence_of_every_kind():
    evidence = {"counts": {"bias": 2, "other": None}, "share": 0.123456, "ok": True}
    assert evidence_words(evidence) == "counts bias 2, other unknown; share 0.1235; ok true"
