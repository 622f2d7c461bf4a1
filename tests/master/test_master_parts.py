"""The master's small pure parts: routes, restarts, latency, metrics."""

import dataclasses

from xllm.master.latency import LatencyMeter
from xllm.master.limits import InstanceLimits
from xllm.master.metrics import MasterMetrics
from xllm.master.outcome import StepOutcome
from xllm.master.restarts import WorkerRestarts
from xllm.master.routes import RequestRoutes
from xllm.master.scheduler import Scheduler
from xllm.protocol.instance import PromptScores, RequestEnded, TokenItem


def outcome_of(*names: str, ended: tuple[str, ...] = ()) -> StepOutcome:
    outcome = StepOutcome()
    outcome.items = [TokenItem(name, 0, 1, 0, (5,)) for name in names]
    outcome.ended = [RequestEnded(name, 1) for name in ended]
    outcome.prompt_scores = [PromptScores(name, 1, 1, ()) for name in names]
    return outcome


def test_each_router_gets_its_own():
    routes = RequestRoutes()
    routes.add("a", 1, b"one")
    routes.add("b", 1, b"two")
    routes.add("c", 1, b"one")
    batches = dict(routes.split(outcome_of("a", "b", "c", "unknown", ended=("a",))))
    assert [item.request_id for item in batches[b"one"].items] == ["a", "c"]
    assert [item.request_id for item in batches[b"two"].items] == ["b"]
    assert [ended.request_id for ended in batches[b"one"].ended] == ["a"]
    assert [scores.request_id for scores in batches[b"two"].prompt_scores] == ["b"]
    assert len(routes) == 2
    assert routes.attempt("a") == -1


def test_a_higher_attempt_moves_a_request_to_its_router():
    routes = RequestRoutes()
    routes.add("a", 1, b"one")
    routes.add("a", 2, b"two")
    assert routes.owned_by(b"one") == []
    assert routes.owned_by(b"two") == [("a", 2)]
    [(router, batch)] = routes.split(outcome_of("a", ended=("a",)))
    assert router == b"two"
    assert len(batch.items) == 1
    # The end of attempt 1 is not the end of attempt 2.
    assert routes.attempt("a") == 2
    routes.remove("a")
    routes.remove("a")
    assert routes.split(outcome_of("a")) == []


def test_restarts_back_off_and_end():
    restarts = WorkerRestarts()
    assert [restarts.ended(-9, t, was_ready=True) for t in (0, 1, 2, 3)] == [0.0, 0.5, 1.0, 2.0]
    assert restarts.ended(-9, 4, was_ready=True) is None
    assert restarts.exit_code == 70


def test_a_worker_that_worked_for_a_while_starts_again_at_once():
    restarts = WorkerRestarts()
    assert [restarts.ended(-9, t, was_ready=True) for t in (0, 10, 15, 25)] == [0.0, 0.0, 1.0, 0.0]
    assert restarts.ended(-9, 40, was_ready=True) is None


def test_ends_that_requests_are_the_reason_of_say_nothing_of_the_worker():
    restarts = WorkerRestarts()
    assert restarts.ended(-9, 0, was_ready=True) == 0.0
    assert all(restarts.ended(1, t, was_ready=True, is_excused=True) == 0.0 for t in range(1, 9))
    assert restarts.ended(-9, 9, was_ready=True) == 0.5


def test_a_worker_that_never_was_ready_is_not_started_at_once():
    restarts = WorkerRestarts()
    assert [restarts.ended(-9, t, was_ready=False) for t in (0, 1, 2)] == [0.5, 1.0, 2.0]


def test_restarts_forget_what_is_long_ago():
    restarts = WorkerRestarts()
    assert all(restarts.ended(70, 61.0 * k, was_ready=True) == 0.0 for k in range(20))
    assert len(restarts._ends) == 1


def test_a_worker_that_cannot_start_is_not_tried_again():
    restarts = WorkerRestarts()
    assert restarts.ended(69, 0.0, was_ready=False) is None
    assert restarts.exit_code == 69


def test_latencies_are_of_the_time_since_the_last_take():
    meter = LatencyMeter()
    meter.note_first_token(0.2)
    meter.note_first_token(0.4)
    meter.note_step(1.0, 0.01, 0)
    meter.note_step(1.1, 0.01, 2)
    meter.note_step(1.2, 0.03, 2)
    meter.note_step(1.5, 0.03, 2)
    summary = meter.take()
    assert abs(summary.ttft_mean_s - 0.3) < 1e-9
    assert summary.ttft_max_s == 0.4
    assert abs(summary.tpot_mean_s - 0.2) < 1e-9
    assert abs(summary.tpot_max_s - 0.3) < 1e-9
    assert abs(summary.step_mean_s - 0.02) < 1e-9
    assert meter.take().ttft_mean_s == 0.0


def test_metrics_are_prometheus_text():
    metrics = MasterMetrics()
    metrics.note_outcome(outcome_of("a", "b", ended=("a",)))
    text = metrics.text(None).decode()
    assert "xllm_master_tokens_total 2.0" in text
    assert "xllm_master_ended_total 1.0" in text
    assert "waiting_sequences" not in text


def test_every_figure_of_the_scheduler_is_exported():
    stats = Scheduler(InstanceLimits("m", 8, 4, 32, 100)).statistics()
    shown = dataclasses.replace(stats, num_paused=3, num_pauses=7)
    text = MasterMetrics().text(shown).decode()
    assert "xllm_master_paused_sequences 3.0" in text
    assert "xllm_master_pauses 7.0" in text
