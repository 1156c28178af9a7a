"""Alerts fire and keep quiet when they should (promtool), lead to runbooks, and name metrics that exist, as dashboards do."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest
import yaml

from components.promote.config import PromoteConfig
from tests.k8s.manifests import K8S, OVERLAYS, Object, named, needs_kubectl, of_kind, overlay
from tests.k8s.promql import (
    alerts,
    autoscaler_metrics,
    dashboards,
    exported_elsewhere,
    metrics,
    panels,
    queries,
    recorded,
    rule_groups,
)

pytestmark = needs_kubectl

HERE = Path(__file__).parent
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


def promtool(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=directory, capture_output=True, text=True, check=False)


def write_rules(directory: Path, objects: list[Object], annotations: bool = True) -> None:
    groups = rule_groups(objects)
    if not annotations:  # promtool would compare their texts as well
        for rule in (rule for group in groups for rule in group["rules"]):
            rule.pop("annotations", None)
    (directory / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))


@needs_promtool
@pytest.mark.parametrize("name", OVERLAYS)
def test_promtool_accepts_the_rules(tmp_path: Path, name: str) -> None:
    write_rules(tmp_path, overlay(name))
    result = promtool("check", "rules", "rules.yaml", directory=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_every_alert_fires_and_is_silent_as_its_unit_tests_say(tmp_path: Path) -> None:
    write_rules(tmp_path, overlay("prod"), annotations=False)
    shutil.copy(HERE / "alerts.yaml", tmp_path)
    result = promtool("test", "rules", "alerts.yaml", directory=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_promtool
def test_every_alert_fires_for_one_namespace_while_another_is_well(tmp_path: Path) -> None:
    """Both run the platform: what is there in one hides nothing that is not there in the other."""
    write_rules(tmp_path, overlay("prod"), annotations=False)
    written = yaml.safe_load((HERE / "alerts.yaml").read_text())
    well, ill = {}, []
    for test in written["tests"]:
        (case,) = test["alert_rule_test"]
        if case["exp_alerts"]:
            ill.append(test)
        else:
            well[case["alertname"]] = test["input_series"]
    for test in ill:
        for series in well[test["alert_rule_test"][0]["alertname"]]:
            if 'namespace="cllmr"' in series["series"]:  # a queue is in none
                name = re.sub(r'(namespace|job)="cllmr', r'\1="cllmr-dev', series["series"])
                test["input_series"].append({**series, "series": name})
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(written | {"tests": ill}))
    result = promtool("test", "rules", "alerts.yaml", directory=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_exposure_that_the_gate_lets_pass_alerts_nobody() -> None:
    (rule,) = [rule for rule in alerts(overlay("prod")) if rule["alert"] == "ServingHeadExposure"]
    assert float(rule["expr"].rpartition(">")[2]) == PromoteConfig().max_head_exposure


@needs_promtool
@pytest.mark.parametrize(
    ("alert", "found", "put"),
    [
        ("ServingSlow", "> 250", "> 2500"),
        ("ServingOffChampion", "== 1", "== 2"),
        ("ServingErrorBudgetFast", "rate1h > 14.4", "rate1h > 144"),
        ("RedisMemoryHigh", "(redis_memory_max_bytes > 0)", "(redis_memory_max_bytes > 1000)"),
        ("RayJobStuck", "Initializing|", ""),
        ("ServingReplicasMissing", "or 0 *", "or 1 *"),
        ("RedisDown", "(gcs|feature)-redis", "feature-redis"),
        ("BackupOld", "kube_cronjob_created", "kube_cronjob_made"),
        ("RayHeadDown", "gcs-redis", "feature-redis"),
        ("RayNodesFailing", "ErrImage.+|ImagePullBackOff", "ErrImage.+"),
        ("RayNodesFailing", "kube_pod_init_container", "kube_pod_container"),
        ("RayNodesFailing", "> 6", "> 60"),
        ("RayNodesFailing", "> 6", "> 5"),
    ],
)
def test_a_rule_that_is_changed_fails_its_unit_test(tmp_path: Path, alert: str, found: str, put: str) -> None:
    objects = overlay("prod")
    (rule,) = [rule for rule in alerts(objects) if rule["alert"] == alert]
    assert found in rule["expr"]
    rule["expr"] = rule["expr"].replace(found, put)
    write_rules(tmp_path, objects, annotations=False)
    written = yaml.safe_load((HERE / "alerts.yaml").read_text())
    written["tests"] = [one for one in written["tests"] if one["name"].startswith(f"{alert} ")]  # all of them take ten seconds
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(written))
    result = promtool("test", "rules", "alerts.yaml", directory=tmp_path)
    assert result.returncode != 0
    assert alert in result.stdout + result.stderr


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    fires, silent = set(), set()
    for test in yaml.safe_load((HERE / "alerts.yaml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            (fires if case["exp_alerts"] else silent).add(case["alertname"])
    names = {rule["alert"] for rule in alerts(overlay("prod"))}
    assert (names - fires, names - silent) == (set(), set())


def test_every_alert_has_a_severity_and_a_runbook_that_exists() -> None:
    for rule in alerts(overlay("prod")):
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        _, _, name = rule["annotations"]["runbook_url"].partition("/k8s/runbooks/")
        text = (K8S / "runbooks" / name).read_text(encoding="utf-8")
        assert rule["alert"] in text, f"runbook {name} does not speak of {rule['alert']}"


def test_every_runbook_is_led_to_by_an_alert_or_by_the_readme() -> None:
    urls = {rule["annotations"]["runbook_url"].rpartition("/")[2] for rule in alerts(overlay("prod"))}
    readme = (K8S / "README.md").read_text(encoding="utf-8")
    for file in (K8S / "runbooks").glob("*.md"):
        assert file.name in urls or f"runbooks/{file.name}" in readme, file.name


@pytest.mark.parametrize("file", ["runbooks/model.md", "README.md"])
def test_the_registry_takes_the_address_by_which_a_person_is_told_to_reach_it(file: str) -> None:
    """Through a forwarded port: the preset's own, http://mlflow:5000, only pods can resolve."""
    (container,) = named(overlay("prod"), "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    allowed = next(one["value"] for one in container["env"] if one["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS").split(",")
    text = (K8S / file).read_text(encoding="utf-8")
    told = re.findall(r"port-forward svc/mlflow (\d+) &\n +cllmr rollback --preset cluster .*tracking_uri=http://(\S+)", text)
    assert told
    assert len(told) == text.count("cllmr rollback --preset")
    for port, host in told:
        assert host == f"localhost:{port}"
        assert any(fnmatch(host, pattern) for pattern in allowed), allowed  # as MLflow compares them
        assert not any(fnmatch(f"127.0.0.1:{port}", pattern) for pattern in allowed), allowed


def test_lines_that_runbooks_look_for_are_logged_by_the_endpoint_and_looked_for_where_ray_puts_them() -> None:
    """Not in `kubectl logs`: Ray sends what its workers write to files."""
    source = "".join(file.read_text(encoding="utf-8") for file in (K8S.parent / "serving").glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in (K8S / "runbooks").glob("*.md"))
    found = re.findall(r"exec \$pod -c ray-worker -- grep -rh '(.+)' (.+)", text)
    assert {place for _, place in found} == {"/tmp/ray/session_latest/logs"}
    assert {line for line, _ in found} == {"bundle refused", "request failed"}
    assert all(f'("{line}"' in source for line, _ in found)
    assert not re.search(r"logs [^`]*ray-(worker|head)", text)


# -- metrics ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ('sum by (a, le) (rate(x_total{b="c{d}",e=~"f|g"}[5m])) and absent(up{i="and"})', {"x_total", "up"}),
        ("ns:y:rate5m > 0.5 * 1e3 / on (h) group_left() other", {"ns:y:rate5m", "other"}),
        ("histogram_quantile(0.95, sum(rate(x_bucket[5m])) by (le)) or vector(0) unless zed", {"x_bucket", "zed"}),
    ],
)
def test_metrics_are_found_in_queries(query: str, found: set[str]) -> None:
    assert metrics(query) == found


@cache
def node_metrics() -> set[str]:
    """What a Ray node exports about itself, GPUs included where there are any."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{gauge.name}" for gauge in METRICS_GAUGES.values()}


def test_the_operators_whose_metrics_are_asked_for_are_scraped() -> None:
    """No overlay holds a monitor of theirs: KubeRay's is made by its chart, Kueue's is a file of its release."""
    assert {item["kind"] for item in overlay("prod") if item["kind"].endswith("Monitor")} == {"PodMonitor"}
    assert yaml.safe_load((K8S / "operators" / "kuberay.yaml").read_text())["metrics"]["serviceMonitor"]["enabled"]
    (kueue,) = [row for row in (K8S / "README.md").read_text(encoding="utf-8").splitlines() if row.startswith("   | Kueue |")]
    assert "`prometheus.yaml`" in kueue


def test_every_metric_that_is_not_rays_own_is_known() -> None:
    """Ray's and the endpoint's are looked up in a running one: tests/k8s/test_scrape.py."""
    objects = overlay("prod")
    unknown = {}
    for who, query in queries(objects).items():
        names = metrics(query) - set(recorded(objects)) - set(exported_elsewhere()) - autoscaler_metrics() - node_metrics()
        if strange := {name for name in names if not name.startswith("ray_")}:
            unknown[who] = strange
    assert unknown == {}


@cache
def endpoint_metrics() -> dict[str, set[str]]:
    """What each metric of the endpoint is exported as, from serving/metrics.py."""
    from ray.util.metrics import Counter, Histogram, Metric

    from serving.gauges import LastingGauge
    from serving.metrics import GatewayMetrics, HistoryMetrics, LogMetrics, Mean, RegistryMetrics, ScorerMetrics, StageTimer

    found = {}
    for of_a_replica in (GatewayMetrics(), HistoryMetrics(), LogMetrics(), RegistryMetrics(), ScorerMetrics()):
        parts = list(vars(of_a_replica).values())
        inner = [metric for part in parts if isinstance(part, Mean | StageTimer) for metric in vars(part).values()]
        for part in [*parts, *inner]:
            metric = part.gauge if isinstance(part, LastingGauge) else part
            if isinstance(metric, Metric):
                name = f"ray_{metric.info['name']}"
                is_histogram = isinstance(metric, Histogram)
                endings = (
                    ("_bucket", "_sum", "_count") if is_histogram else ("_total",) if isinstance(metric, Counter) else ("",)
                )
                found[name] = {name + ending for ending in endings}
    return found


def test_every_metric_of_the_endpoint_that_is_asked_for_is_one_and_each_is_asked_for() -> None:
    asked = set().union(*(metrics(query) for query in queries(overlay("prod")).values()))
    exported = set().union(*endpoint_metrics().values())
    assert {name for name in asked if name.startswith("ray_cllmr_")} - exported == set()
    assert [name for name, samples in endpoint_metrics().items() if not samples & asked] == []
    assert len(endpoint_metrics()) >= 11


def test_every_exporter_that_is_described_is_asked() -> None:
    asked = set().union(*(metrics(query) for query in queries(overlay("prod")).values()))
    assert set(exported_elsewhere()) <= asked


def test_a_metric_that_nobody_exports_is_not_known() -> None:
    assert "autoscaler_pending_node" not in autoscaler_metrics()
    assert "autoscaler_pending_nodes" in autoscaler_metrics()
    assert "ray_node_gpus_utilization" in node_metrics()


# -- dashboards -------------------------------------------------------------------------------------------------------------


def test_dashboards_are_small_have_titles_units_and_no_panel_over_another() -> None:
    objects = overlay("prod")
    assert set(dashboards(objects)) == {"serving.json", "batch.json"}
    for item in of_kind(objects, "ConfigMap"):
        assert sum(len(text) for text in item["data"].values()) < 1_000_000
    for dashboard in dashboards(objects).values():
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(set(places)) == len(places)
        for panel in dashboard["panels"]:
            assert panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]


def test_every_panel_looks_at_one_namespace_or_at_a_queue() -> None:
    for who, query in panels(overlay("prod")):
        assert '$namespace"' in query or "kueue_" in query, who
