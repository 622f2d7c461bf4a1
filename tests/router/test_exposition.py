"""One metrics page of many processes."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from xllm.router.exposition import merge_texts

MASTER = b"""# HELP steps_total Steps.
# TYPE steps_total counter
steps_total 5
steps_total{role="worker",rank="0"} 7.0
# HELP wait_seconds Waits.
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 1
wait_seconds_bucket{le="+Inf"} 2
wait_seconds_sum 0.5
wait_seconds_count 2
"""


def test_samples_are_grouped_and_labelled():
    page = merge_texts(
        [
            ({"role": "master", "instance": "a"}, MASTER),
            ({"role": "master", "instance": 'b"\n'}, MASTER),
        ]
    ).decode()
    assert page.count("# TYPE steps_total") == 1
    families = {one.name: one for one in text_string_to_metric_families(page)}
    steps = {tuple(sorted(s.labels.items())): s.value for s in families["steps"].samples}
    assert len(steps) == 4
    assert steps[("instance", "a"), ("rank", "0"), ("role", "worker")] == 7
    assert len(families["wait_seconds"].samples) == 8
    assert {s.labels["instance"] for s in families["steps"].samples} == {"a", 'b"\n'}


def test_nonsense_is_dropped():
    page = merge_texts(
        [({"x": "y"}, b'\xff\xfe{{{\nname{unclosed 3\nok 1\n# TYPE\nfine{a="b"} NaN\n3\n')]
    )
    assert page == b'ok{x="y"} 1\nfine{a="b",x="y"} NaN\n'
    assert merge_texts([({}, b"")]) == b""


def test_labels_that_look_like_labels_inside_values():
    page = merge_texts([({"role": "master"}, b'm{path="a,role=\\"x\\""} 1\n')])
    assert page == b'm{path="a,role=\\"x\\"",role="master"} 1\n'


def test_a_series_is_there_once():
    one, other = {"x": "y"}, {"x": "z"}
    page = merge_texts([(one, b"m 1\nm 2\n"), (other, b"m 3\n"), (one, b"m 4\n")])
    assert page == b'm{x="y"} 1\nm{x="z"} 3\n'
