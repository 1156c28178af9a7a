"""Every query of alerts and dashboards against a real Prometheus that scrapes a real Ray with the endpoint on it.

The labels that a cluster's monitors add are added here as well. A query of metrics that only a cluster has (operators,
exporters) is not asked; the others must have an answer, so that none names a metric or a label that nothing exports.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.bundles import write_bundle
from tests.k8s.manifests import needs_kubectl, overlay
from tests.k8s.promql import alerts, autoscaler_metrics, exported_elsewhere, metrics, queries, recorded, rule_groups
from tests.stores import free_ports, listens
from tests.waiting import wait_until

pytestmark = [
    needs_kubectl,
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)"),
]

JOB = "cllmr/ray-heads"
LABELS = {"namespace": "cllmr", "endpoint": "metrics", "app_instance": "serving", "ray_io_cluster": "serving-a"}
WAIT_SECONDS = 240
QUIET_METRICS = {
    "ray_node_gpus_utilization",  # a machine without GPUs exports none
    # a counter begins to exist when it first counts: tests/integration/test_model_swap.py
    "ray_cllmr_model_swaps_total",
    "ray_cllmr_refused_bundles_total",
    # likewise: tests/integration/test_trial.py, test_online_history.py, tests/contract/test_http_endpoint.py, test_admission.py
    "ray_cllmr_challenger_info",
    "ray_cllmr_shadow_overlap_sum_total",
    "ray_cllmr_shadow_overlap_count_total",
    "ray_cllmr_shadow_score_difference_sum_total",
    "ray_cllmr_shadow_score_difference_count_total",
    "ray_cllmr_shadow_left_out_total",
    "ray_cllmr_last_good_histories_total",
    "ray_cllmr_feature_rows_total",
    "ray_cllmr_refused_profiles_total",
    "ray_cllmr_lost_log_lines_total",
    "ray_cllmr_new_items_total",
    "ray_cllmr_refused_requests_total",
}

SERVE = """
import sys
from ray import serve
import ray
from serving.app import AppArgs, RegistryArgs, build_app
address, port, bundle, root = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)}, proxy_location="HeadOnly")
registry = RegistryArgs(tracking_uri=f"sqlite:///{root}/mlflow.db", model_name="cllmr")
args = {"storage_root": root, "train": "0" * 16, "features": "0" * 16, "model_version": "1", "bundle_dir": bundle}
args = AppArgs(**args, registry=registry, feature_loading_s=0)
serve.run(build_app(args), name="cllmr", route_prefix="/")
"""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a Prometheus with our rules that has scraped an endpoint under some traffic."""
    directory = tmp_path_factory.mktemp("scrape")
    names = ("gcs", "metrics", "dashboard", "http", "prometheus")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,  # only of a cluster that lives for this test
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    write_bundle(directory / "bundle")
    short = Path("/tmp") / f"scrape-{os.getpid()}"  # Ray's sockets: a path may have 107 characters
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    head += [f"--port={ports['gcs']}", f"--metrics-export-port={ports['metrics']}", f"--dashboard-port={ports['dashboard']}"]
    head += ["--num-cpus=4", "--object-store-memory=100000000", f"--temp-dir={short}"]
    (directory / "rules.yaml").write_text(yaml.safe_dump({"groups": rule_groups(overlay("prod"))}))
    (directory / "prometheus.yaml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
                "rule_files": ["rules.yaml"],
                "scrape_configs": [
                    {
                        "job_name": JOB,
                        "static_configs": [{"targets": [f"127.0.0.1:{ports['metrics']}"], "labels": LABELS}],
                    }
                ],
            }
        )
    )
    server = ["prometheus", f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data"]
    server += [f"--web.listen-address=127.0.0.1:{ports['prometheus']}"]
    logs = (directory / "log").open("w")
    running = [subprocess.Popen(command, env=environment, stdout=logs, stderr=logs) for command in (head, server)]
    try:
        wait_until("the head node", lambda: listens(ports["gcs"]))
        serve = [sys.executable, "-c", SERVE, f"127.0.0.1:{ports['gcs']}", str(ports["http"]), str(directory / "bundle")]
        deployed = subprocess.run(
            [*serve, str(directory)], env=environment, capture_output=True, text=True, check=False, timeout=WAIT_SECONDS
        )
        assert deployed.returncode == 0, deployed.stderr[-2000:]
        url = f"http://127.0.0.1:{ports['http']}"
        for _ in range(15):  # a rate needs a counter that has grown while it was watched
            for path in ("recommend", "recommend", "nowhere"):
                httpx.post(f"{url}/v1/{path}", json={"users": ["9"], "k": 2}, timeout=60)
            event = {"user_id": "9", "item_id": "i1", "timestamp": int(time.time())}
            httpx.post(f"{url}/v1/events", json={"events": [event]}, timeout=60)
            time.sleep(1)
        yield f"http://127.0.0.1:{ports['prometheus']}"
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=60)
        logs.close()
        shutil.rmtree(short, ignore_errors=True)


def ask(url: str, query: str) -> list[dict[str, object]]:
    response = httpx.get(f"{url}/api/v1/query", params={"query": query.replace("$namespace", "cllmr")}, timeout=60)
    assert response.status_code == 200, f"{query}: {response.text}"
    result: list[dict[str, object]] = response.json()["data"]["result"]
    return result


def names_of_ray() -> set[str]:
    objects = overlay("prod")
    asked = set().union(*(metrics(query) for query in queries(objects).values()))
    elsewhere = set(exported_elsewhere()) | set(recorded(objects)) | autoscaler_metrics()
    return asked - elsewhere - QUIET_METRICS


def test_every_metric_of_ray_and_of_the_endpoint_is_exported(prometheus: str) -> None:
    wanted = names_of_ray()
    assert {"ray_cllmr_degraded_answers_total", "ray_serve_num_http_requests_total", "ray_node_mem_used"} <= wanted
    wait_until(
        "somebody to export them",
        lambda: sorted(name for name in wanted if not ask(prometheus, name)),
        lambda missing: not missing,
        WAIT_SECONDS,
    )


def test_every_query_has_an_answer(prometheus: str) -> None:
    """Panels and recording rules; an alert has none, as nothing is wrong here."""
    objects = overlay("prod")
    exported = names_of_ray() | set(recorded(objects))
    thresholds = {rule["alert"] for rule in alerts(objects)}
    # on the one cluster there is here
    asked = {
        who: query.replace('app_instance=~"train|sideinfo"', 'app_instance="serving"')
        for who, query in queries(objects).items()
        if who not in thresholds and metrics(query) <= exported
    }

    def unanswered() -> dict[str, str]:
        """Of those that were not answered before: Ray tells some gauges only now and then."""
        for who in [who for who, query in asked.items() if ask(prometheus, query)]:
            del asked[who]
        return asked

    wait_until("every query to be answered", unanswered, lambda left: not left, WAIT_SECONDS)


def test_prometheus_takes_every_query(prometheus: str) -> None:
    for query in queries(overlay("prod")).values():
        ask(prometheus, query)


def test_a_metric_that_nobody_exports_has_no_answer(prometheus: str) -> None:
    assert ask(prometheus, "ray_serve_num_http_request_total") == []
    assert ask(prometheus, 'ray_serve_num_http_requests_total{application="other"}') == []
